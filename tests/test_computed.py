"""Networks that compute different things have different names, and the same network has the same name in every process: by kinds of Python."""
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from functools import partial
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sparselab.learn.computed import described
from sparselab.learn.factories import model_digest, own_model

BEGIN = """
import collections, dataclasses, enum, functools, operator, random, sys, types
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize


class Net(nn.Module):
    def __init__(self, act=torch.relu):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.act = nn.Linear(3, 2), act

    def forward(self, x):
        return self.act(self.layer(x))


def module(name, **values):
    made = sys.modules[name] = types.ModuleType(name)
    vars(made).update(values)
    return made

"""


def kinds(text: str) -> dict[str, str]:
    """Name -> Python of each part of a text; a line `# name:` is above it."""
    parts = re.split(r"^# (.+):\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


# The network make(k) depends on k, 1 or 2.
KINDS = kinds(r"""
# default of a lambda:
def make(k): return Net(lambda x, k=k: k * x)

# default by keyword:
def make(k):
    def act(x, *, k=k): return k * x
    return Net(act)

# closure:
def make(k): return Net(lambda x: k * x)

# closure of a closure:
def make(k):
    inner = lambda x: k * x
    return Net(lambda x: inner(x))

# closure that is empty:
def make(k):
    def act(x):
        try:
            return late * x
        except NameError:
            return x
    if k == 2:
        late = 3
    return Net(act)

# signature:
def make(k):
    ns = {}
    exec(f"def act(x, {'*' * (k - 1)}k): return x + len(k)", ns)
    return Net(lambda x: ns['act'](x, (1, 2)))

# part that is tried:
def make(k):
    ns = {}
    texts = ('def act(x):\n try: y = x.none\n except AttributeError: return x\n return 2 * x',
             'def act(x):\n try: y = x\n except AttributeError: return x\n return 2 * x')
    exec(texts[k - 1], ns)
    return Net(ns['act'])

# partial:
def make(k): return Net(functools.partial(torch.mul, k))

# partial by keyword:
def make(k): return Net(functools.partial(torch.clamp, min=-k / 9))

# attribute of a function:
def make(k):
    def act(x): return act.k * x
    act.k = k
    return Net(act)

# wraps:
def make(k):
    @functools.wraps(F.relu)
    def act(x): return k * x
    return Net(act)

# wraps, of its text:
def make(k):
    acts = functools.wraps(F.relu)(lambda x: x), functools.wraps(F.relu)(lambda x: 2 * x)
    return Net(acts[k - 1])

# decorator that is an object:
class Times:
    def __init__(self, f, k):
        functools.update_wrapper(self, f)
        self.k = k
    def __call__(self, x): return self.k * self.__wrapped__(x)
def make(k): return Net(Times(torch.relu, k))

# cache:
def make(k): return Net(functools.lru_cache(lambda x: k * x))

# global number:
def make(k):
    global K
    K = k
    return Net(lambda x: K * x)

# global that is none:
def make(k):
    global K
    K = [None, 2][k - 1]
    return Net(lambda x: x if K is None else K * x)

# global set:
def make(k):
    global K
    K = {k, 7}
    return Net(lambda x: x * min(K))

# global dictionary with a none:
def make(k):
    global K
    K = {'k': [k, None]}
    return Net(lambda x: x * K['k'][0])

# global namespace:
def make(k):
    global K
    K = SimpleNamespace(k=k)
    return Net(lambda x: x * K.k)

# global array:
def make(k):
    global K
    K = np.array([1, k])
    return Net(lambda x: x * float(K[1]))

# global dataclass:
@dataclasses.dataclass
class Setting:
    k: int
def make(k):
    global K
    K = Setting(k)
    return Net(lambda x: x * K.k)

# global of a global:
def inner(x): return K * x
def outer(x): return inner(x)
def make(k):
    global K
    K = k
    return Net(outer)

# global in a comprehension:
def make(k):
    global K
    K = k
    return Net(lambda x: sum([K * x for _ in 'ab']))

# module of yours:
def make(k):
    global lib
    lib = module('lib_of_this', K=k)
    return Net(lambda x: x * lib.K)

# module in a module:
def make(k):
    global lib
    lib = module('lib_of_this', part=module('lib_of_this.part', K=k))
    return Net(lambda x: x * lib.part.K)

# module as an attribute:
def make(k):
    net = Net(lambda x: x * net.lib[0].K)
    net.lib = [module('lib_of_this', K=k)]
    return net

# file imported in forward:
def make(k):
    Path('helper_of_this.py').write_text(f'K = {k}\n')
    sys.modules.pop('helper_of_this', None)
    def act(x):
        from helper_of_this import K
        return K * x
    return Net(act)

# method of an object:
class Times:
    def __init__(self, k): self.k = k
    def of(self, x): return self.k * x
def make(k): return Net(Times(k).of)

# method of a tensor:
def make(k): return Net(torch.tensor(float(k)).mul)

# method of a number:
def make(k): return Net(lambda x, f=float(k).__mul__: x * f(1.0))

# methodcaller:
def make(k): return Net(operator.methodcaller('mul', k))

# builtin of another module:
def make(k): return Net([torch.exp, torch.special.expm1][k - 1])

# slots:
class Times:
    __slots__ = ('k',)
    def __init__(self, k): self.k = k
    def __call__(self, x): return self.k * x
def make(k): return Net(Times(k))

# subclass of dict:
def make(k):
    class Mine(dict):
        def __missing__(self, name): return k
    table = Mine(a=1)
    return Net(lambda x: x * table['b'])

# items of a subclass of dict:
class Mine(dict): pass
def make(k):
    table = Mine(a=k)
    return Net(lambda x: x * table['a'])

# elements of a subclass of list:
class Mine(list): pass
def make(k):
    table = Mine([k])
    return Net(lambda x: x * table[0])

# subclass of float:
class Mine(float): pass
def make(k):
    value = Mine(k)
    return Net(lambda x: x * float(value))

# named tuple:
Pair = collections.namedtuple('Pair', 'a b')
def make(k):
    pair = Pair(1, k)
    return Net(lambda x: x * pair.b)

# factory of a defaultdict:
def make(k):
    table = collections.defaultdict(lambda: k)
    return Net(lambda x: x * table.default_factory())

# deque of objects:
class Times:
    def __init__(self, k): self.k = k
def make(k):
    table = collections.deque([Times(k)])
    return Net(lambda x: x * table[0].k)

# enum:
class Kind(enum.Enum):
    ONE = 1
    TWO = 2
def make(k):
    kind = Kind(k)
    return Net(lambda x: x * kind.value)

# order of a dictionary:
def make(k):
    table = dict([('a', 1), ('b', 2)][::2 * k - 3])
    return Net(lambda x: x * next(iter(table.values())))

# set and number:
def make(k):
    value = [3, {3}][k - 1]
    return Net(lambda x: x if value == 3 else 2 * x)

# generator of torch:
def make(k):
    g = torch.Generator().manual_seed(k)
    return Net(lambda x: x + torch.rand(2, generator=torch.Generator().set_state(g.get_state())))

# generator of numpy:
def make(k):
    rng = np.random.default_rng(k)
    return Net(lambda x: x + rng.bit_generator.state['state']['state'] % 97)

# masked array:
def make(k):
    m = np.ma.array([1.0, 2.0], mask=[k == 1, k == 2])
    return Net(lambda x: x * float(m.sum()))

# array of objects:
def make(k):
    a = np.array([None, k], dtype=object)
    return Net(lambda x: x * a[1])

# sparse tensor:
def make(k):
    t = torch.tensor([0.0, float(k)]).to_sparse()
    return Net(lambda x: x + t.to_dense())

# subclass of a tensor:
class Mine(torch.Tensor): k = 1
class Other(torch.Tensor): k = 2
def make(k):
    t = torch.ones(2).as_subclass([Mine, Other][k - 1])
    return Net(lambda x: x * t.k)

# attribute of a tensor:
def make(k):
    t = torch.ones(2)
    t.k = k
    return Net(lambda x: x * t.k)

# shared storage:
def make(k):
    a = torch.ones(2)
    b = a[:] if k == 1 else a.clone()
    def act(x):
        a.fill_(2.0)
        y = x * b
        a.fill_(1.0)
        return y
    return Net(act)

# shared list:
def make(k):
    a = []
    b = a if k == 1 else []
    def act(x):
        a.append(1)
        y = x * (1 + len(b))
        a.pop()
        return y
    return Net(act)

# type of numbers:
def make(k):
    net = Net()
    net.register_buffer('b', torch.tensor(1 / 3, dtype=[torch.float32, torch.float64][k - 1]))
    net.act = lambda x: x.double() * net.b.double()
    return net

# buffer:
def make(k):
    net = Net(lambda x: x * net.b)
    net.register_buffer('b', torch.tensor(float(k)))
    return net

# buffer that is not saved:
def make(k):
    net = Net(lambda x: x * net.b)
    net.register_buffer('b', torch.tensor(float(k)), persistent=False)
    return net

# attribute set later:
def make(k):
    net = Net(lambda x: x * net.k)
    net.k = 0
    net.k += k
    return net

# attribute in a slot:
class Slotted(Net):
    __slots__ = ('k',)
    def forward(self, x): return self.k * super().forward(x)
def make(k):
    net = Slotted()
    net.k = k
    return net

# hook before and after:
def make(k):
    net = Net()
    hook = lambda module, args, *output: tuple(2 * each for each in args) if not output else None
    (net.layer.register_forward_pre_hook if k == 1 else net.layer.register_forward_hook)(hook)
    return net

# hook with keywords:
def make(k):
    net = Net()
    seen = lambda *given: given[-1] * len(given)
    net.layer.register_forward_hook(seen, with_kwargs=k == 2)
    return net

# which hook has keywords:
def make(k):
    net = Net()
    for i in (1, 2):
        net.layer.register_forward_hook(lambda *given: given[-1] * len(given) + len(given), with_kwargs=i == k)
    return net

# parametrization:
class Times(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k
    def forward(self, w): return self.k * w
def make(k):
    net = Net()
    parametrize.register_parametrization(net.layer, 'weight', Times(k))
    return net

# text of a parametrization:
class One(nn.Module):
    def forward(self, w): return w + 1
class Two(nn.Module):
    def forward(self, w): return w + 2
def make(k):
    net = Net()
    parametrize.register_parametrization(net.layer, 'weight', [One, Two][k - 1]())
    return net

# forward of the object:
def make(k):
    net = Net()
    net.forward = lambda x: k * net.layer(x)
    return net

# forward of the class:
def make(k):
    class Mine(Net): pass
    Mine.forward = lambda self, x: k * self.layer(x)
    return Mine()

# forward of a base:
def make(k):
    class Base(Net):
        def forward(self, x): return k * self.layer(x)
    class Mine(Base): pass
    return Mine()

# class of the object:
class Two(Net):
    def forward(self, x): return 2 * super().forward(x)
def make(k):
    net = Net()
    net.__class__ = [Net, Two][k - 1]
    return net

# property:
def make(k):
    class Mine(Net):
        @property
        def k(self): return k
        def forward(self, x): return self.k * self.layer(x)
    return Mine()

# setter:
def make(k):
    class Mine(Net):
        @property
        def k(self): return self.act_k
        @k.setter
        def k(self, v): self.act_k = k * v
        def forward(self, x):
            self.k = 1
            return self.k * self.layer(x)
    return Mine()

# cached property:
def make(k):
    class Mine(Net):
        @functools.cached_property
        def k(self): return k
        def forward(self, x): return type(self).__dict__['k'].func(self) * self.layer(x)
    return Mine()

# static method:
def make(k):
    class Mine(Net):
        @staticmethod
        def k(): return k
        def forward(self, x): return self.k() * self.layer(x)
    return Mine()

# partial method:
def make(k):
    class Mine(Net):
        def times(self, x, k): return k * self.layer(x)
        forward = functools.partialmethod(times, k=k)
    return Mine()

# descriptor:
class Value:
    def __init__(self, k): self.k = k
    def __get__(self, *owner): return self.k
def make(k):
    class Mine(Net):
        k = Value(0)
        def forward(self, x): return self.k * self.layer(x)
    Mine.k = Value(k)
    return Mine()

# object of the class:
def make(k):
    class Mine(Net):
        def forward(self, x): return self.table.k * self.layer(x)
    Mine.table = SimpleNamespace(k=k)
    return Mine()

# which name of the class:
def make(k):
    class Mine(Net):
        def one(self): return 1
        def two(self): return 2
        def forward(self, x): return self.n() * self.layer(x)
    Mine.n = [Mine.one, Mine.two][k - 1]
    return Mine()

# metaclass:
class Meta(type):
    def __call__(cls, *args):
        made = super().__call__(*args)
        return made
    k = property(lambda cls: cls.factor)
def make(k):
    class Mine(Net, metaclass=Meta):
        factor = k
        def forward(self, x): return type(self).k * self.layer(x)
    return Mine()

# function of autograd:
def make(k):
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return k * x
    return Net(Times.apply)

# class of PyTorch that was patched:
ITS_OWN = nn.Linear.forward
def make(k):
    nn.Linear.forward = ITS_OWN if k == 1 else lambda self, x: 2 * ITS_OWN(self, x)
    return Net()
def end(): nn.Linear.forward = ITS_OWN

# function of PyTorch that was patched:
ITS_OWN = F.silu
def make(k):
    F.silu = ITS_OWN if k == 1 else lambda x: 2 * ITS_OWN(x)
    return Net(lambda x: torch.nn.functional.silu(x))
def end(): F.silu = ITS_OWN

# circle:
def make(k):
    net = Net(lambda x: x * net.me[0].k)
    net.me, net.k = (net,), k
    return net
""")

# The network make(k) is the same for k of 1 and 2.
SAME = kinds(r"""
# numbers of hooks:
def make(k):
    for _ in range(k):
        net = Net()
        net.handle = net.layer.register_forward_hook(lambda *args: None)
    return net

# variable called as an attribute:
def make(k):
    global layer
    layer = k
    return Net()

# address in what is printed:
class Mine(Net):
    def extra_repr(self): return f'{self.act}, {id(self)}'
def make(k): return Mine(lambda x: x)

# line:
def make(k):
    ns = dict(globals())
    exec('\n' * k + 'class Mine(Net):\n    def forward(self, x): return self.layer(x)\n', ns)
    return ns['Mine']()

# file:
def make(k):
    ns = dict(globals())
    exec(compile('act = lambda x: x', f'{k}.py', 'exec'), ns)
    return Net(ns['act'])

# what a cache holds:
def make(k):
    act = functools.lru_cache(lambda x: x)
    act(k)
    return Net(act)

# sets:
class Word(str): pass
def make(k):
    net = Net()
    net.words = {'ape', 'bee', 'cat', 'dog', 'eel'}, frozenset([Word('ape'), ('bee', 1), None])
    return net

# object of a class:
class Thing: pass
def make(k):
    net = Net()
    net.thing, net.words = Thing(), {Thing: Thing(), 'a': {Thing()}}
    return net

# abstract class:
import abc
class Base(abc.ABC):
    @abc.abstractmethod
    def one(self): ...
    @abc.abstractmethod
    def two(self): ...
def make(k):
    net = Net()
    net.base = Base
    return net

# set that holds itself:
class Held:
    pass
def make(k):
    net, held = Net(), Held()
    held.group = {held}
    net.group = held.group
    return net

# a thousand functions:
exec('\n'.join(f'def f{i}(x): return f{i + 1}(x)' for i in range(1000)) + '\ndef f1000(x): return x', globals())
def make(k): return Net(f0)
""")

PROCESS = """
import json, sys
from sparselab.learn.factories import model_digest
kinds, begin = json.load(sys.stdin)
found = {}
for name, text in kinds.items():
    exec(begin + text, globals())
    found[name] = [model_digest(make(k)) for k in (1, 2)]
    if "def end()" in text:
        end()
print(json.dumps(found))
"""


def names_in_another_process(folder, seed: int) -> dict:
    """What the networks of all kinds are called in a fresh Python, whose sets have another order."""
    given = json.dumps([KINDS | SAME, BEGIN])
    done = subprocess.run([sys.executable, "-c", PROCESS], input=given, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The names in two processes."""
    return [names_in_another_process(tmp_path_factory.mktemp("process"), seed) for seed in (1, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_computes_something_else_has_another_name(kind, elsewhere, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    space = {"__name__": "__main__"}
    exec(BEGIN + KINDS[kind], space)
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
    found, outputs = [], []
    for k in (1, 2):
        net = space["make"](k)
        found.append([model_digest(net), model_digest(space["make"](k))])
        outputs.append(net(x).detach())
        found[-1].append(model_digest(space["make"](k)))
    space.get("end", int)()
    assert not torch.equal(*outputs), "the two networks of this test compute the same"
    (first, *again), (second, *others) = found
    assert {first} == {*again} and {second} == {*others} and first != second
    assert elsewhere[0][kind] == elsewhere[1][kind] and len(set(elsewhere[0][kind])) == 2


@pytest.mark.parametrize("kind", SAME)
def test_what_computes_the_same_has_the_same_name(kind, elsewhere):
    space = {"__name__": "__main__"}
    exec(BEGIN + SAME[kind], space)
    assert len({model_digest(space["make"](k)) for k in (1, 2, 1)}) == 1
    assert elsewhere[0][kind] == elsewhere[1][kind] and len(set(elsewhere[0][kind])) == 1


Pair = namedtuple("Pair", "left right")
CONTAINERS = {
    "list": list, "tuple": tuple, "dict": lambda parts: dict(enumerate(parts)), "set": lambda parts: {described(part) for part in parts},
    "keys": lambda parts: {described(part): 1 for part in parts}, "deque": lambda parts: deque(parts, maxlen=9),
    "namespace": lambda parts: SimpleNamespace(p=parts), "partial": lambda parts: partial(print, *parts),
    "default": lambda parts: defaultdict(int, enumerate(parts)), "ordered": lambda parts: OrderedDict(enumerate(parts)),
    "pair": lambda parts: Pair(parts[0], parts[1:]), "view": lambda parts: MappingProxyType(dict(enumerate(parts))),
    "slice": lambda parts: slice(parts[0], parts[1:]), "layers": lambda parts: holding(nn.Identity(), parts),
    "array": lambda parts: np.array([*parts, None], dtype=object)}
LEAVES = {
    "int": int, "float": float, "text": str, "bytes": lambda n: bytes([n]), "tensor": torch.tensor, "array": np.array, "range": range,
    "complex": complex, "whole": np.int64, "bits": lambda n: torch.tensor([n > 100, n % 2]), "type": lambda n: (f"t{n}", torch.float16),
    "none": lambda n: (None, n)}


def holding(module: nn.Module, parts: list) -> nn.Module:
    module.parts = parts
    return module


def anything(rng: random.Random, depth: int, numbers: Iterator[int]) -> object:
    """A value of containers in containers; each of its numbers is the next one."""
    if depth == 0 or rng.random() < 0.2:
        return LEAVES[rng.choice(sorted(LEAVES))](next(numbers))
    parts = [anything(rng, depth - 1, numbers) for _ in range(rng.randint(1, 3))]
    return CONTAINERS[rng.choice(sorted(CONTAINERS))](parts)


@pytest.mark.parametrize("seed", range(60))
def test_one_number_anywhere_is_in_the_name(seed):
    def made(change: int | None = None) -> tuple[str, int]:
        used = []

        def numbers():
            while True:
                used.append(len(used))
                yield 50 + len(used) + 100 * (len(used) == change)

        value = anything(random.Random(seed), 4, numbers())
        return model_digest(holding(nn.Identity(), value)), len(used)

    name, count = made()
    assert made()[0] == name
    changed = [made(each + 1)[0] for each in range(count)]
    assert len({name, *changed}) == count + 1


def test_a_hook_on_a_gradient_which_a_copy_has_not_is_a_sentence():
    net = nn.Linear(3, 2)
    net.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ValueError, match="^weight of Linear has a hook on its gradient, which a copy of it has not"):
        own_model(net)


def test_a_name_is_found_in_no_time():
    """Each of these lists was compared with all before it."""
    begun = time.process_time()
    assert described(holding(nn.Identity(), [[i] for i in range(20_000)])).count("\n") > 20_000
    assert time.process_time() - begun < 5
