"""from_onnx: the module of a file says what ONNX Runtime says of it, is read by every bound, and refuses what it does not know by a sentence."""
import gzip
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sparselab.learn.models import build
from sparselab.robust import Contradiction, bounds, decide, from_onnx, input_box, verify
from sparselab.robust.certificates import exported, onnx_of
from sparselab.robust.onnx_files import RULES

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

NODE = helper.make_node


def saved(path, nodes, weights, shape, out=(1, 3), kind=TensorProto.FLOAT, opset=17, more_inputs=()):
    """An ONNX file with input x and output y; `weights`: name -> array."""
    ends = [[helper.make_tensor_value_info(end, kind, dims)] for end, dims in (("x", shape), ("y", out))]
    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in weights.items()]
    graph = helper.make_graph(nodes, "network", ends[0] + list(more_inputs), ends[1], tensors)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8).SerializeToString())
    return path


def floats(*shape, seed=0):
    return np.random.default_rng(seed + math.prod(shape)).normal(size=shape).astype(np.float32) / max(1, math.prod(shape[1:])) ** 0.5


def dense(flat, *widths):
    """Gemm and Relu for each width, from the activation `flat` on; the last one makes y."""
    nodes, weights, before = [], {}, flat
    for i, (n, m) in enumerate(zip(widths, widths[1:], strict=False)):
        last = i == len(widths) - 2
        weights |= {f"W{i}": floats(m, n), f"b{i}": floats(m)}
        nodes.append(NODE("Gemm", [before, f"W{i}", f"b{i}"], ["y" if last else f"z{i}"], transB=1))
        nodes += [] if last else [NODE("Relu", [f"z{i}"], [f"a{i}"])]
        before = f"a{i}"
    return nodes, weights


def mnistfc(shape, axis=1):
    nodes, weights = dense("f", math.prod(shape), 16, 12, 3)
    first = [NODE("Sub", ["x", "mean"], ["c"]), NODE("Flatten", ["c"], ["f"], axis=axis)]
    return first + nodes, {"mean": floats(*shape), **weights}, shape


def unbatched():
    nodes, weights = dense("f", 12, 8, 3)
    return [NODE("Flatten", ["x"], ["f"], axis=0), *nodes], weights, (12, 1)


def acasxu():
    """MatMul and Add instead of Gemm, on (1, 1, 1, 5)."""
    nodes = [NODE("Sub", ["x", "mean"], ["c"]), NODE("Flatten", ["c"], ["f"]), NODE("MatMul", ["f", "W"], ["m"]), NODE("Add", ["m", "b"], ["z"]),
             NODE("Relu", ["z"], ["a"]), NODE("MatMul", ["a", "V"], ["n"]), NODE("Add", ["d", "n"], ["y"])]
    return nodes, {"mean": floats(1, 1, 1, 5), "W": floats(5, 9), "b": floats(9), "V": floats(9, 3), "d": floats(3)}, (1, 1, 1, 5)


def gemm_options():
    nodes = [NODE("Gemm", ["x", "W", "b"], ["z"], alpha=0.5, beta=2.0), NODE("LeakyRelu", ["z"], ["a"], alpha=0.2),
             NODE("Gemm", ["a", "V"], ["y"], transB=1, alpha=-1.5)]
    return nodes, {"W": floats(6, 5), "b": floats(1), "V": floats(3, 5)}, ("n", 6)


def convolutions():
    """Every kind of padding, strides, dilation, groups, BatchNorm, both pools, and a residual sum."""
    nodes = [NODE("Conv", ["x", "A", "a"], ["c1"], auto_pad="SAME_LOWER", strides=[2, 2]), NODE("Relu", ["c1"], ["r1"]),
             NODE("Conv", ["r1", "B"], ["c2"], pads=[1, 1, 1, 1], group=2),
             NODE("BatchNormalization", ["c2", "s", "t", "m", "v"], ["n"], epsilon=1e-3),
             NODE("Add", ["n", "r1"], ["sum"]), NODE("Relu", ["sum"], ["r2"]),
             NODE("Conv", ["r2", "C", "c"], ["c3"], pads=[2, 0, 1, 1], dilations=[2, 1]),
             NODE("MaxPool", ["c3"], ["p1"], kernel_shape=[2, 2]), NODE("AveragePool", ["p1"], ["p2"], kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
             NODE("GlobalAveragePool", ["p2"], ["g"]), NODE("Flatten", ["g"], ["f"]), NODE("Gemm", ["f", "W", "b"], ["y"], transB=1)]
    norm = {key: floats(4, seed=i) for i, key in enumerate("stm")}
    weights = {"A": floats(4, 2, 3, 3), "a": floats(4), "B": floats(4, 2, 3, 3), **norm, "v": 1 + floats(4) ** 2,
               "C": floats(6, 4, 2, 2), "c": floats(6), "W": floats(3, 6), "b": floats(3)}
    return nodes, weights, (1, 2, 9, 9)


def computed_shape():
    """x.view(x.shape[0], -1), as torch writes it, after a transposition to NHWC."""
    nodes, weights = dense("f", 24, 8, 3)
    first = [NODE("Identity", ["x"], ["i"]), NODE("Transpose", ["i"], ["t"], perm=[0, 2, 3, 1]), NODE("Shape", ["x"], ["s"]),
             NODE("Gather", ["s", "zero"], ["n"], axis=0), NODE("Unsqueeze", ["n", "axes"], ["u"]), NODE("Concat", ["u", "rest"], ["shape"], axis=0),
             NODE("Reshape", ["t", "shape"], ["f"])]
    return first + nodes, weights | {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([-1])}, ("n", 2, 3, 4)


def constants():
    """A weight that is computed in the file, a constant of a node, a Dropout that does nothing, and a part that nothing reads."""
    value = numpy_helper.from_array(np.float32([2.0]), "two")
    nodes = [NODE("Constant", [], ["two"], value=value), NODE("Mul", ["W", "two"], ["W2"]), NODE("Transpose", ["W2"], ["Wt"], perm=[1, 0]),
             NODE("Sigmoid", ["x"], ["unused"]), NODE("Dropout", ["x"], ["d"]), NODE("Div", ["d", "two"], ["h"]), NODE("MatMul", ["h", "Wt"], ["z"]),
             NODE("Tanh", ["z"], ["a"]), NODE("Clip", ["a", "low"], ["q"]), NODE("Neg", ["q"], ["y"])]
    return nodes, {"W": floats(3, 5), "low": np.float32(-0.5)}, (1, 5)


FORMS = {"mnistfc": lambda: mnistfc((1, 1, 4, 4)), "mnistfc, flat": lambda: mnistfc((1, 12)), "unbatched": unbatched, "acasxu": acasxu,
         "gemm options": gemm_options, "convolutions": convolutions, "computed shape": computed_shape, "constants": constants}


def runtime(path, x):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    shape = [size if isinstance(size, int) else 1 for size in session.get_inputs()[0].shape]
    return torch.cat([torch.from_numpy(session.run(None, {"x": image.numpy().reshape(shape)})[0]) for image in x])


@pytest.mark.parametrize("form", FORMS)
def test_a_file_says_what_a_runtime_says(form, tmp_path):
    """And its bounds contain what it says of points of the box."""
    path = saved(tmp_path / "net.onnx", *FORMS[form]())
    network = from_onnx(path)
    x = torch.rand(5, *network.input_shape)
    y = network(x).detach()
    torch.testing.assert_close(y, runtime(path, x), atol=1e-5, rtol=1e-5)
    lower, upper = input_box(x, 0.05)
    for method in ("ibp", "crown"):
        lb, ub = bounds(network, lower, upper, method)
        for point in (lower, upper, lower + torch.rand_like(x) * (upper - lower)):
            z = network(point).detach()
            assert bool(((lb <= z + 1e-5) & (z <= ub + 1e-5)).all())
    assert verify(network, x, y.argmax(1), 1e-4).clean.all()


MODELS = [("mlp", (1, 8, 8), {}), ("cnn4", (1, 8, 8), {"width": 4}), ("cnn7_bn", (3, 32, 32), {"width": 4, "hidden": (16,)}),
          ("resnet5_bn", (3, 8, 8), {})]


@pytest.mark.parametrize("name, shape, options", MODELS)
def test_models_come_back_as_they_left(name, shape, options, tmp_path):
    """Exported for a certificate and read again: the same outputs and CROWN bounds."""
    model = build(name, shape, 4, **options).eval()
    x = torch.rand(3, *shape)
    (tmp_path / "net.onnx").write_bytes(onnx_of(exported(model, x)))
    network = from_onnx(tmp_path / "net.onnx")
    assert network.input_shape == shape
    torch.testing.assert_close(network(x), model(x), atol=1e-5, rtol=1e-5)
    box = input_box(x, 0.01)
    for ours, theirs in zip(bounds(network, *box, "crown_ibp"), bounds(model, *box, "crown_ibp"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_product_and_its_bias_are_one_linear_layer(tmp_path):
    network = from_onnx(saved(tmp_path / "net.onnx", *acasxu()))
    assert [type(layer) for layer in network.layers.values()][2:] == [nn.Linear, nn.ReLU, nn.Linear]
    assert sorted(dict(network.named_parameters())) == [f"layers.MatMul_{i}.{part}" for i in (2, 5) for part in ("bias", "weight")]


def test_a_product_that_others_read_keeps_its_sum_apart(tmp_path):
    """y = m + (m + b): the bias must not enter m."""
    nodes = [NODE("MatMul", ["x", "W"], ["m"]), NODE("Add", ["m", "b"], ["s"]), NODE("Add", ["m", "s"], ["y"])]
    path = saved(tmp_path / "net.onnx", nodes, {"W": floats(4, 3), "b": 1 + floats(3)}, (1, 4))
    x = torch.rand(2, 4)
    torch.testing.assert_close(from_onnx(path)(x), runtime(path, x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("first", ["cast", "relu"])
def test_a_product_that_others_read_by_another_name_keeps_its_sum_apart(first, tmp_path):
    """y = relu(m) + (cast(m) + b), with m below zero in [0, 1]^2, where a bias in m would not be seen."""
    nodes = [NODE("Cast", ["m"], ["c"], to=TensorProto.FLOAT), NODE("Relu", ["m"], ["r"])]
    nodes = nodes if first == "cast" else nodes[::-1]
    nodes = [NODE("MatMul", ["x", "W"], ["m"]), *nodes, NODE("Add", ["c", "b"], ["s"]), NODE("Add", ["s", "r"], ["y"])]
    path = saved(tmp_path / "net.onnx", nodes, {"W": -np.eye(2, dtype=np.float32), "b": np.float32([-3, -3])}, (1, 2), out=(1, 2))
    x = torch.tensor([[0.5, 0.5], [-2.0, -5.0]])
    torch.testing.assert_close(from_onnx(path)(x), torch.tensor([[-3.5, -3.5], [1.0, 7.0]]))


LEFT_OUT = {"Clip without a minimum": ([NODE("Clip", ["x", "", "high"], ["y"])], {"high": np.float32(0.5)}, (1, 3)),
            "Clip without a maximum": ([NODE("Clip", ["x", "low", ""], ["y"])], {"low": np.float32(0.5)}, (1, 3)),
            "Gemm without a bias": ([NODE("Gemm", ["x", "W", ""], ["y"])], {"W": floats(4, 3)}, (1, 4)),
            "Conv without a bias": ([NODE("Conv", ["x", "W", ""], ["y"])], {"W": floats(2, 1, 2, 2)}, (1, 1, 3, 3))}


@pytest.mark.parametrize("form", LEFT_OUT)
def test_inputs_that_are_left_out_by_an_empty_name(form, tmp_path):
    nodes, weights, shape = LEFT_OUT[form]
    path = saved(tmp_path / "net.onnx", nodes, weights, shape, out=None)
    x = torch.randn(3, *shape[1:])
    torch.testing.assert_close(from_onnx(path)(x).flatten(1), runtime(path, x).flatten(1), atol=1e-6, rtol=1e-6)


def test_a_file_that_the_reference_cannot_compute_is_refused_by_a_sentence(tmp_path):
    """Of version 6 the reference has no Dropout."""
    path = saved(tmp_path / "net.onnx", [NODE("Dropout", ["x"], ["y"], is_test=1)], {}, (1, 3), opset=6)
    with pytest.raises(ValueError, match="ONNX's reference cannot compute"):
        from_onnx(path)


def test_double_precision_compressed_and_external_files(tmp_path):
    nodes, weights, shape = mnistfc((1, 12))
    wide = {key: value.astype(np.float64) for key, value in weights.items()}
    doubles = saved(tmp_path / "double.onnx", nodes, wide, shape, kind=TensorProto.DOUBLE)
    x = torch.rand(2, 12, dtype=torch.float64)
    torch.testing.assert_close(from_onnx(doubles)(x), runtime(doubles, x), atol=1e-12, rtol=1e-12)
    (tmp_path / "double.onnx.gz").write_bytes(gzip.compress(doubles.read_bytes()))
    assert torch.equal(from_onnx(tmp_path / "double.onnx.gz")(x), from_onnx(doubles)(x))
    onnx.save_model(onnx.load(doubles), tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert torch.equal(from_onnx(tmp_path / "outside.onnx")(x), from_onnx(doubles)(x))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises((ValueError, OSError), match=r"weights\.bin|outside\.onnx"):
        from_onnx(tmp_path / "outside.onnx")


def test_decide_is_complete_on_a_file(tmp_path):
    """Of the mnistfc form: at no radius is anything left open, and the radius at which the verdict changes is one."""
    network = from_onnx(saved(tmp_path / "net.onnx", *mnistfc((1, 1, 4, 4))))
    x = torch.rand(2, 1, 4, 4)
    y = network(x).argmax(1)
    words = [decide(network, x, y, eps, 600).verdicts for eps in (0.001, 0.03, 0.1, 0.3, 1.0)]
    assert all(set(found) <= {"verified", "falsified"} for found in words)
    for one in zip(*words, strict=True):
        assert one == tuple(sorted(one, reverse=True)) and one[0] == "verified"


# ---------------------------------------------------------------- refused


def bad(name, nodes, weights, shape, words, **options):
    return pytest.param(nodes, weights, shape, words, options, id=name)


W = {"W": floats(3, 4)}
BAD = [
    bad("operation", [NODE("Softmax", ["x"], ["y"], name="last")], {}, (1, 3), "Node 'last' .Softmax. cannot be read.*has no rule; export"),
    bad("domain", [NODE("Relu", ["x"], ["y"], domain="ours")], {}, (1, 3), "no rule"),
    bad("transposed", [NODE("Gemm", ["x", "W"], ["y"], transA=1)], {"W": floats(1, 3)}, (1, 3), "mixes the images"),
    bad("left product", [NODE("MatMul", ["W", "x"], ["y"])], {"W": floats(1, 1)}, (1, 3), "mixes the images"),
    bad("two images", [NODE("Relu", ["x"], ["y"])], {}, (2, 3), "for 2 images at once"),
    bad("open size", [NODE("Relu", ["x"], ["y"])], {}, ("n", "m"), "left open"),
    bad("no weight", [NODE("Gemm", ["x", "V"], ["y"])], {}, (1, 3), "reads 'V', which nothing before it makes"),
    bad("weight depends", [NODE("Gemm", ["x", "x"], ["y"])], {}, (1, 3), "is no constant"),
    bad("constant input", [NODE("Gemm", ["W", "x"], ["y"])], {"W": floats(1, 1)}, (1, 3), "does not depend on the image"),
    bad("constant output", [NODE("Relu", ["W"], ["y"])], W, (1, 3), "does not depend on its input"),
    bad("does not fit", [NODE("Gemm", ["x", "W"], ["y"])], {"W": floats(5, 3)}, (1, 3), "do not fit"),
    bad("unknown option", [NODE("Relu", ["x"], ["y"], colour=1)], {}, (1, 3), "do not fit.*colour"),
    bad("batch lost", [NODE("Reshape", ["x", "s"], ["y"])], {"s": np.array([3])}, (1, 3), "the batch stays in front"),
    bad("batch moved", [NODE("Transpose", ["x"], ["y"])], {}, (1, 3), "moves the batch"),
    bad("wrong size", [NODE("Reshape", ["x", "s"], ["y"])], {"s": np.array([1, 5])}, (1, 3), "does not become"),
    bad("flatten", [NODE("Flatten", ["x"], ["y"], axis=2)], {}, (1, 2, 3), "use axis=1"),
    bad("mean of a batch", [NODE("ReduceMean", ["x"], ["y"], axes=[0])], {}, (1, 3), "over the images of a batch"),
    bad("concat", [NODE("Concat", ["x", "x"], ["y"], axis=0)], {}, (1, 3), "joins the images"),
    bad("training", [NODE("BatchNormalization", ["x", *"abcd"], ["y", "m", "v"], training_mode=1)], dict.fromkeys("abcd", floats(3)), (1, 3),
        "training mode"),
    bad("uneven maximum", [NODE("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], pads=[1, 0, 0, 0])], {}, (1, 1, 4, 4), "more on one side"),
    bad("uneven mean", [NODE("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], pads=[1, 0, 0, 0])], {}, (1, 1, 4, 4), "more on one side"),
    bad("over the end", [NODE("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)], {}, (1, 1, 5, 5), "ceil_mode"),
    bad("folded softmax", [NODE("Softmax", ["W"], ["s"], name="probs"), NODE("Gemm", ["x", "s"], ["y"], transB=1)], W, (1, 4),
        "'probs' .Softmax. cannot be read.*fold its constants", opset=11),
    bad("folded by others", [NODE("Add", ["W", "W"], ["s"], domain="ours"), NODE("Gemm", ["x", "s"], ["y"], transB=1)], W, (1, 4),
        "fold its constants"),
    bad("indices", [NODE("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2]), NODE("Add", ["p", "i"], ["y"])], {}, (1, 1, 4, 4), "second output"),
    bad("half precision", [NODE("Relu", ["x"], ["y"])], {}, (1, 3), "float16", kind=TensorProto.FLOAT16),
    bad("two inputs", [NODE("Add", ["x", "z"], ["y"])], {}, (1, 3), "2 inputs",
        more_inputs=[helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3))]),
]


@pytest.mark.parametrize("nodes, weights, shape, words, options", BAD)
def test_what_is_not_known_is_refused_by_a_sentence(nodes, weights, shape, words, options, tmp_path):
    path = saved(tmp_path / "net.onnx", nodes, weights, shape, **options)
    with pytest.raises(ValueError, match=words) as caught:
        from_onnx(path)
    assert str(caught.value).endswith(".")


def test_cut_files_are_refused_wherever_they_are_cut(tmp_path):
    whole = saved(tmp_path / "net.onnx", *convolutions()).read_bytes()
    for path, data in (("cut.onnx", whole), ("cut.onnx.gz", gzip.compress(whole))):
        for end in [0, 1, 2, 17, *range(60, len(data), 97), len(data) - 1]:
            (tmp_path / path).write_bytes(data[:end])
            with pytest.raises(ValueError, match="cut|no ONNX file|cannot be read|reads '|inputs and|shape"):
                from_onnx(tmp_path / path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*none.onnx"):
        from_onnx(tmp_path / "none.onnx")
    with pytest.raises(OSError, match="cannot be read"):
        from_onnx(tmp_path)


def test_without_the_package_the_sentence_names_the_extra(tmp_path, monkeypatch):
    path = saved(tmp_path / "net.onnx", *mnistfc((1, 12)))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"sparselab\[onnx\]"):
        from_onnx(path)


def test_a_rule_that_lies_is_found(tmp_path, monkeypatch):
    """ONNX's own reference is asked at a random image, and where the lie is far outside of [0, 1]."""
    path = saved(tmp_path / "net.onnx", *mnistfc((1, 12)))
    monkeypatch.setitem(RULES, "Relu", lambda node: nn.LeakyReLU(0.5))
    with pytest.raises(Contradiction, match="differs from ONNX's reference"):
        from_onnx(path)
    path = saved(tmp_path / "net.onnx", [NODE("Relu", ["x"], ["y"])], {}, (1, 3))
    monkeypatch.setitem(RULES, "Relu", lambda node: nn.Hardtanh(0, 8))
    with pytest.raises(Contradiction, match="differs from ONNX's reference"):
        from_onnx(path)
