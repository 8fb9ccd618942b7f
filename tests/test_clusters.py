"""Sweeps that take minutes: digits on two cores, on a Ray cluster whose workers and nodes are killed, through submitit with
pre-emption, and five hundred points killed twice."""
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from test_sweeps import BEGIN, END, PARAMETERS, ROOT, SMALL, notebook, same_as_single_runs, trained

from sparselab.scale import sweep

pytestmark = pytest.mark.slow
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra ray)")
needs_slurm = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed (extra slurm)")
GRID = {"method": ["rigl", "set"], "sparsity": [0.5, 0.9], "seed": 0}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """matplotlib draws the pictures, in the workers too, and every process imports this sparselab."""
    monkeypatch.setenv("BROWSER_PATH", "none")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_thirty_runs_on_two_cores_are_the_single_runs_to_the_bit(tmp_path):
    """3 sparsities, 5 seeds and 2 methods on digits; the time is that of two cores that are never idle, but for 15 %."""
    base = {"epochs": 6, "eps": 0.05, "test_samples": 100, "runs_dir": str(tmp_path / "runs")}
    begun, before = time.monotonic(), os.times()
    done = sweep(base, {"method": ["rigl", "sparsevlr"], "sparsity": [0.5, 0.8, 0.9], "seed": "0..4"}, options={"workers": 2})
    wall, after = time.monotonic() - begun, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{done}\nwall time {wall:.0f} s, {wall / (busy / 2):.2f} of half the processor time")
    assert not done.failed and len(done.runs) == 35 and done.trained == 35
    assert same_as_single_runs(done, tmp_path) > 35 * 15


def killed_twice(folder: Path, points: int, seconds: float) -> None:
    """Sweep over `points` seeds, of which three fail, in a process that is killed after `seconds`, twice, and then to its end."""
    unlucky = f"if seed in (1, {points // 2}, {points - 1}):\n    raise ValueError('no luck')"
    stand_in = notebook(folder / "stand_in.ipynb", PARAMETERS, BEGIN, unlucky, END)
    given = f"{{'runs_dir': {str(folder / 'runs')!r}}}, {{'method': 'rigl', 'seed': '0..{points - 1}'}}, with_dense=False"
    code = f"from sparselab.scale import sweep\nprint(sweep({given}, notebook={str(stand_in)!r}, options={{'workers': 2}}))"
    counts = []
    for limit in (seconds, seconds, None):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                told = process.communicate(timeout=limit)[0]
            except subprocess.TimeoutExpired:
                process.kill()
        counts.append(sum(trained(folder / "runs").values()))
    print(f"trained after each call: {counts}")
    assert 0 < counts[0] < counts[1] < counts[2] == points - 3, "a kill came too early or too late to show anything"
    assert set(trained(folder / "runs").values()) == {1}, "something was trained twice"
    sentences = [line for line in told.splitlines() if line.endswith(": ValueError: no luck")]
    assert len(set(sentences)) == 3 and f"{points - 3} of {points} runs finished" in told


def test_five_hundred_points_killed_twice_are_trained_once_each(tmp_path):
    killed_twice(tmp_path, 500, 120)


# Ray

def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Cluster:
    """A Ray cluster of two nodes on this machine, each with a core and a resource of its own: first, which has the head, and second."""

    def __init__(self, folder: Path):
        self.folder, self.nodes = folder, {}
        self.port, = free_ports(1)
        self.address = f"127.0.0.1:{self.port}"
        self.start("first")
        self.start("second")

    def start(self, name: str) -> None:
        """Start the node; the ports are fixed, since Ray waits for those that it has to find for 15 seconds only."""
        ports = free_ports(5)
        kinds = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port", "metrics-export-port", "node-manager-port")
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        command = [Path(sys.executable).with_name("ray"), "start", *(head if name == "first" else [f"--address={self.address}"]),
                   "--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats",
                   "--include-log-monitor=false", f'--resources={{"{name}": 1}}',
                   *(f"--{kind}={port}" for kind, port in zip(kinds, ports, strict=True))]
        for _ in range(3):  # on a busy machine Ray does not wait long enough for its own processes
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
            self.stop(f"--node_manager_port={ports[-1]}" if name == "second" else str(self.folder))
        assert done.returncode == 0, done.stdout + done.stderr
        self.nodes[name] = ports[-1]

    def raylet(self, name: str) -> int | None:
        """The process of a node."""
        return next((pid for pid, words in processes() if words[0].endswith("/raylet") and f"--node_manager_port={self.nodes[name]}" in words), None)

    def workers(self) -> list[int]:
        """The processes that execute a job."""
        raylets = {self.raylet(name) for name in self.nodes}
        return [pid for pid, words in processes() if words[0].startswith("ray::execute_values") and parent(pid) in raylets]

    def kill_node(self, name: str) -> bool:
        """As a machine that loses its power: the raylet is killed, and its workers with it. Whether it was there."""
        return killed(self.raylet(name))

    def stop(self, word: str = "") -> None:
        """End the processes of the cluster that were started with `word`, by default all."""
        for pid, words in processes():
            if pid != os.getpid() and any((word or str(self.folder)) in each for each in words):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def processes() -> list[tuple[int, list[str]]]:
    """Number and words of every process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found += [(int(path.parent.name), words)] if words[0] else []
    return found


def killed(pid: int | None) -> bool:
    """Kill a process; whether it was there: one that has just been seen may have ended by itself."""
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # sockets below it have names of at most 107 characters
    made = Cluster(folder)
    yield made
    made.stop()


def killing(cluster: Cluster, times: int, done: threading.Event) -> list[str]:
    """Kill a worker or the second node, by turns and `times` times in all, each at a random moment of a job; what was killed."""
    dice, told = random.Random(0), []
    while len(told) < times and not done.wait(0.2):
        if not cluster.workers() or done.wait(dice.uniform(0.5, 6)):
            continue
        if len(told) % 2:
            if cluster.kill_node("second"):
                told.append("node")
                cluster.start("second")
        elif (workers := cluster.workers()) and killed(dice.choice(workers)):
            told.append("worker")
    return told


@needs_ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_ray_cluster_whose_workers_and_nodes_die_gives_the_same_bits(tmp_path, cluster):
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(killing, cluster, 10, done)
        try:
            found = sweep({**SMALL, "runs_dir": str(tmp_path / "runs")}, {**GRID, "seed": "0..1"}, executor="ray",
                          options={"address": cluster.address}, retries=10)
        finally:
            done.set()
    told = killer.result()  # raises what the killer raised
    print(f"killed: {told}; {found}")
    assert not found.failed and len(found.runs) == 10 and told == ["worker", "node"] * 5
    same_as_single_runs(found, tmp_path)


@needs_ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_resource_that_only_one_node_has_is_kept(tmp_path, cluster):
    cell = "import os\nstat = Path(f'/proc/{os.getppid()}/stat').read_text()\n(folder / 'node').write_text(stat.rpartition(')')[2].split()[1])"
    stand_in = notebook(tmp_path / "stand_in.ipynb", PARAMETERS, BEGIN, cell, END)  # the worker's parent is the raylet
    done = sweep({"runs_dir": str(tmp_path / "runs")}, {"method": "rigl", "seed": "0..1"}, executor="ray", with_dense=False, notebook=str(stand_in),
                 options={"address": cluster.address, "resources": {"second": 1}})
    assert {(run / "node").read_text() for run in (tmp_path / "runs").glob("rigl-*")} == {str(cluster.raylet("second"))}
    assert not done.failed and len(done.runs) == 2


@needs_ray
def test_a_cluster_that_is_not_there_is_a_sentence(tmp_path):
    port, = free_ports(1)
    with pytest.raises(ConnectionError, match="There is no Ray cluster at .*ray start --head"):
        sweep({"runs_dir": str(tmp_path / "runs")}, {"seed": 0}, executor="ray", options={"address": f"127.0.0.1:{port}"})


# submitit

@needs_slurm
def test_submitit_with_pre_emption_gives_the_same_bits(tmp_path):
    """Every few seconds a task gets the signal by which Slurm pre-empts it; submitit queues it again."""
    done, told = threading.Event(), []

    def signal_tasks():
        dice = random.Random(0)
        while not done.wait(dice.uniform(5, 15)) and len(told) < 6:
            tasks = [pid for pid, words in processes() if "submitit.core._submit" in words and str(tmp_path) in " ".join(words)]
            ready = [pid for pid in tasks if signal.SIGUSR2 in caught(pid)]
            if ready:
                os.kill(dice.choice(ready), signal.SIGUSR2)
                told.append("pre-empted")

    killer = threading.Thread(target=signal_tasks)
    killer.start()
    try:
        found = sweep({**SMALL, "runs_dir": str(tmp_path / "runs")}, GRID, executor="slurm", retries=5,
                      options={"cluster": "local", "parallel": 2, "folder": str(tmp_path / "slurm"), "parameters": {"timeout_min": 60}})
    finally:
        done.set()
        killer.join()
    print(f"{told}; {found}")
    assert not found.failed and len(found.runs) == 5 and told
    same_as_single_runs(found, tmp_path)


def caught(pid: int) -> set[int]:
    """The signals that a process has a handler for."""
    try:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    except OSError:
        return set()
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


@needs_slurm
def test_the_debug_executor_of_submitit_executes_in_this_process(tmp_path):
    stand_in = notebook(tmp_path / "stand_in.ipynb", PARAMETERS, BEGIN, END)
    done = sweep({"runs_dir": str(tmp_path / "runs")}, {"method": "rigl", "seed": "0..1"}, executor="slurm", with_dense=False, notebook=str(stand_in),
                 options={"cluster": "debug", "folder": str(tmp_path / "slurm")})
    assert not done.failed and len(done.runs) == 2
