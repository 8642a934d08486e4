"""`gradwatch run`: a program is as it is under Python alone, and what it trains is watched; in real processes."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from interpreters import warm
from truth import norms, same

from gradwatch import read_runs

TORCH = tuple(map(int, importlib.metadata.version("torch").split(".")[:2]))

RUN = ("-m", "gradwatch", "run")


@dataclass
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def own_err(self) -> str:
        """What the program itself has written."""
        return "".join(line for line in self.err.splitlines(keepends=True) if not line.startswith("gradwatch: "))


def python(folder: Path, *arguments: str, text: str = "", command: tuple[str, ...] = (sys.executable,)) -> Ended:
    done = subprocess.run(
        [*command, *arguments], cwd=folder, input=text, capture_output=True, text=True, check=False, timeout=120
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def trains(folder: Path, *arguments: str) -> Ended:
    """Run what imports torch."""
    return python(folder, *arguments, command=warm())


def write(folder: Path, name: str, source: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")


PROGRAMS = {
    "what it is told of itself": """
        import inspect, pickle, sys
        from pathlib import Path
        import beside
        class Mine:
            def __eq__(self, other):
                return type(self) is type(other)
        if __name__ == "__main__":
            print(sys.argv, sys.path[0], __file__, __spec__, __package__, __cached__, __doc__)
            print(type(__loader__).__name__)
            print(pickle.loads(pickle.dumps(Mine())) == Mine(), pickle.dumps(Mine()))
            print(inspect.getsource(Mine).splitlines()[0], beside.HERE, sys.stdin.read(), __annotations__)
            print(sorted(vars(sys.modules["__main__"])), "torch" in sys.modules, "numpy" in sys.modules)
    """,
    "the end by a number": "import sys; print('so far'); sys.exit(7)",
    "the end by a text": "import sys; sys.exit('not like this')",
    "the end by nothing": "import sys; sys.exit()",
    "an exception": """
        def inner():
            raise KeyError("no") from None
        try:
            1 / 0
        except ZeroDivisionError:
            inner()
    """,
    "an exception with a hook of its own": """
        import sys
        def hook(kind, error, trace):
            print("caught", kind, error, trace.tb_frame.f_code.co_name, trace.tb_next)
        sys.excepthook = hook
        raise ValueError("mine")
    """,
    "a syntax error": "print('x'\ndef",
    "an exception in the import of another": "import broken",
    "at the exit": """
        import atexit, threading, time
        atexit.register(lambda: print("exit", __name__, Later))
        class Later: ...
        def late():
            time.sleep(0.2)
            print("thread")
        threading.Thread(target=late).start()
        print("main")
    """,
    "workers that nobody has ended": """
        import concurrent.futures
        pool = concurrent.futures.ThreadPoolExecutor(1)
        print(pool.submit(lambda: 42).result())
    """,
    "an exit from a thread": """
        import os, threading, time
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread", flush=True), os._exit(5))).start()
    """,
    "children": """
        import multiprocessing, sys
        def square(x):
            return Number(x.value ** 2)
        class Number:
            def __init__(self, value):
                self.value = value
        if __name__ == "__main__":
            for way in ("spawn", "fork"):
                with multiprocessing.get_context(way).Pool(1) as pool:
                    print([n.value for n in pool.map(square, [Number(2), Number(3)])])
    """,
    "warnings": "import warnings; warnings.warn('look', stacklevel=1); assert not __debug__, 'debugging'",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_as_it_is_under_python_alone(tmp_path, name):
    write(tmp_path, "sub/program.py", PROGRAMS[name])
    write(tmp_path, "sub/beside.py", "HERE = 'here'")
    write(tmp_path, "sub/broken.py", "import nothing_of_this_name")
    alone = python(tmp_path, "sub/program.py", "--a", "-m", "b c", text="given")
    watched = python(tmp_path, *RUN, "sub/program.py", "--a", "-m", "b c", text="given")
    assert (watched.code, watched.out, watched.own_err) == (alone.code, alone.out, alone.err)
    assert not (tmp_path / "runs").exists()


def test_a_first_argument_of_two_dashes_is_the_programs(tmp_path):
    write(tmp_path, "program.py", "import sys; print(sys.argv)")
    assert python(tmp_path, *RUN, "program.py", "--", "x").out == "['program.py', '--', 'x']\n"


def test_a_module_is_as_it_is_under_python_alone(tmp_path):
    write(tmp_path, "package/__init__.py", "import sys; print(sys.argv)")
    write(tmp_path, "package/part.py", "VALUE = 3")
    source = """
        import sys
        from .part import VALUE
        print(sys.argv, sys.path[0], __name__, __spec__.name, __package__, __file__, VALUE)
        raise SystemExit(4)
    """
    write(tmp_path, "package/train.py", source)
    write(tmp_path, "package/__main__.py", source)
    for name in ("package.train", "package"):
        alone = python(tmp_path, "-m", name, "-x", "1")
        watched = python(tmp_path, *RUN, "-m", name, "-x", "1")
        assert (watched.code, watched.out, watched.own_err) == (alone.code, alone.out, alone.err)
        assert watched.code == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_as_it_would(tmp_path, number):
    write(tmp_path, "program.py", f"import os, signal; os.kill(os.getpid(), {int(number)}); import time; time.sleep(9)")
    alone, watched = python(tmp_path, "program.py"), python(tmp_path, *RUN, "program.py")
    assert (watched.code, watched.own_err) == (alone.code, alone.err)
    assert watched.code == -number


def test_an_interrupt_that_the_program_lets_through_ends_it_as_a_signal_after_a_training_too(tmp_path):
    write(tmp_path, "train.py", TRAINING + "    raise KeyboardInterrupt\n")
    alone, watched = python(tmp_path, "train.py"), python(tmp_path, *RUN, "train.py")  # which import what is ours anew
    assert (watched.code, watched.out) == (alone.code, alone.out)
    assert watched.code == -signal.SIGINT
    assert "gradwatch: 1 model watched" in watched.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.py"], "No such file or directory: '.*none.py'"),
        (["-m", "nothing.here"], "no module named 'nothing.here'"),
        (["-m", "empty"], "no module named 'empty', or it is a package without __main__|No module named"),
        (["--horizon", "0", "none.py"], "must be at least 1, got 0"),
        ([], "required: SCRIPT"),
    ],
)
def test_what_cannot_be_run_is_said_with_status_2(tmp_path, arguments, said):
    write(tmp_path, "empty/__init__.py", "")
    ended = python(tmp_path, *RUN, *arguments)
    assert ended.code == 2
    assert re.search(said, ended.err)


TRAINING = """
    import sys, torch
    torch.manual_seed(0)
    deep = len(sys.argv) > 1
    layers = [m for _ in range(10 if deep else 2) for m in (torch.nn.Linear(8, 8), torch.nn.Sigmoid())]
    net = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    truth = []
    for step in range(30):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        for half in x.chunk(2):
            loss = (net(half) - half).square().mean() / 2
            loss.backward()
        truth.append([float(p.grad.double().norm()) for p in net.parameters()])
        optimizer.step()
    with open("truth.txt", "w") as file:
        print(truth, file=file)
    print([p.sum().item() for p in net.parameters()], torch.rand(1).item(), loss.item())
"""


def test_an_unmodified_training_is_the_same_and_its_norms_and_losses_are_recorded(tmp_path):
    write(tmp_path, "train.py", TRAINING)
    alone = trains(tmp_path, "train.py")
    watched = trains(tmp_path, *RUN, "train.py")
    assert (watched.code, watched.out) == (0, alone.out)
    assert "gradwatch: 1 model watched" in watched.err
    assert "30 measured steps, 0 to 29" in watched.err
    (run,) = read_runs(tmp_path / "runs" / "train").values()
    truth = eval((tmp_path / "truth.txt").read_text())  # the program's own list
    same([list(norms(s).values()) for s in run.snapshots], truth)
    assert [s.step for s in run.snapshots] == [*range(30)]
    assert list((tmp_path / "runs" / "train" / "gradwatch-Sequential").glob("events.out.tfevents*"))
    last = float(alone.out.split()[-1])
    assert run.snapshots[-1].loss == pytest.approx(2 * last, rel=0.2)  # of both halves, which weigh the same
    assert all(s.loss is not None for s in run.snapshots)
    assert run.snapshots[1].activations


@pytest.mark.parametrize(("limit", "code"), [(None, 0), ("warning", 1), ("error", 0)])
def test_only_where_it_is_asked_for_an_alert_is_a_status_of_its_own(tmp_path, limit, code):
    write(tmp_path, "train.py", TRAINING)
    asked = () if limit is None else ("--fail-on", limit)
    ended = trains(tmp_path, *RUN, "--logdir", "elsewhere", "--every", "1", *asked, "train.py", "deep")
    assert ended.code == code
    assert "GW101" in ended.err
    assert read_runs(tmp_path / "elsewhere")
    assert not (tmp_path / "runs").exists()


SEQUENCES = """
    import torch
    torch.manual_seed(0)
    rnn, head = torch.nn.RNN(2, 8, batch_first=True), torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=0.1)
    for step in range(31):
        x = torch.randn(8, 60, 2)
        optimizer.zero_grad()
        (head(rnn(x)[0][:, -1]) - x[:, 0, :1]).square().mean().backward()
        optimizer.step()
"""


@pytest.mark.parametrize("horizon", [None, 3, 50])
def test_the_declared_horizon_is_judged_and_every_nth_step_is_measured(tmp_path, horizon):
    asked = () if horizon is None else ("--horizon", str(horizon))
    ended, runs = recorded(tmp_path, SEQUENCES, "--every", "3", *asked)
    (run,) = runs.values()
    assert [s.step for s in run.snapshots] == [*range(0, 31, 3)]
    assert run.snapshots[-1].sequences[0].need == horizon
    assert ("GW301" in ended.err) == (horizon != 3)  # for information, where nothing is declared
    assert ("and the need is 50" in ended.err) == (horizon == 50)


def test_the_project_says_what_fails_and_what_is_muted(tmp_path):
    write(tmp_path, "train.py", TRAINING)
    write(tmp_path, "pyproject.toml", '[tool.gradwatch]\nfail-on = "warning"\n')
    assert trains(tmp_path, *RUN, "train.py", "deep").code == 1
    assert trains(tmp_path, *RUN, "--fail-on", "never", "train.py", "deep").code == 0
    write(tmp_path, "pyproject.toml", '[tool.gradwatch]\nfail-on = "warning"\nignore = ["GW101"]\n')
    assert trains(tmp_path, *RUN, "train.py", "deep").code == 0
    write(tmp_path, "pyproject.toml", "[tool.gradwatch]\nwindow = 0\n")
    ended = trains(tmp_path, *RUN, "train.py", "deep")
    assert ended.code == 2
    assert "Thresholds.window must be finite and above 0, got 0" in ended.err


def test_a_status_of_the_program_is_not_replaced(tmp_path):
    write(tmp_path, "train.py", TRAINING + "    sys.exit(3)\n")
    assert trains(tmp_path, *RUN, "--fail-on", "warning", "train.py", "deep").code == 3


def recorded(folder: Path, source: str, *options: str):
    write(folder, "train.py", source)
    ended = trains(folder, *RUN, *options, "train.py")
    assert ended.code == 0, ended.err
    path = folder / "runs" / "train"
    return ended, dict(read_runs(path)) if path.exists() else {}


def test_an_error_within_backward_or_a_closure_is_shown_without_our_frames(tmp_path):
    write(
        tmp_path,
        "train.py",
        """
        import sys, torch
        w = torch.ones(2, requires_grad=True)
        def closure():
            optimizer.zero_grad()
            if len(sys.argv) > 1:
                raise RuntimeError("within the closure")
            w.sum().backward()
            w.backward()
        optimizer = torch.optim.SGD([w], lr=0.1)
        optimizer.step(closure)
        """,
    )
    for arguments in ((), ("closure",)):
        alone, watched = python(tmp_path, "train.py", *arguments), python(tmp_path, *RUN, "train.py", *arguments)
        assert (watched.code, watched.err) == (1, alone.err)


GAN = """
    import torch
    torch.manual_seed(0)
    generator, critic = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    g, c = torch.optim.Adam(generator.parameters()), torch.optim.Adam(critic.parameters())
    for _ in range(5):
        fake = generator(torch.randn(8, 2))
        c.zero_grad()
        critic(torch.randn(8, 3)).mean().mul(0).add(1).backward()
        critic(fake.detach()).mean().mul(0).add(2).backward()
        c.step()
        g.zero_grad()
        critic(fake).mean().mul(0).add(10).backward()
        g.step()
"""


def test_two_models_have_a_watcher_each_and_their_own_losses(tmp_path):
    ended, runs = recorded(tmp_path, GAN)
    assert "gradwatch: 2 models watched" in ended.err
    by_width = {run.snapshots[0].model.parameters[0].shape: run for run in runs.values()}
    assert [s.loss for s in by_width[1, 3].snapshots] == [3.0] * 5
    assert [s.loss for s in by_width[3, 2].snapshots] == [10.0] * 5


def test_two_optimizers_of_one_model_are_one_run_from_the_first_step_on(tmp_path):
    source = GAN.replace("    for _", "    both = torch.nn.ModuleDict({'g': generator, 'c': critic})\n    for _")
    _, runs = recorded(tmp_path, source)
    ((_, run),) = runs.items()
    assert [(s.step, s.optimizer, s.loss) for s in run.snapshots] == [
        (step, optimizer, loss) for step in range(5) for optimizer, loss in ((0, 3.0), (1, 10.0))
    ]
    assert {p.name for p in run.snapshots[-1].model.parameters} == {"g.weight", "g.bias", "c.weight", "c.bias"}


def test_an_optimizer_for_each_parameter_is_one_step_also_where_they_are_made_on_the_way(tmp_path):
    _, runs = recorded(
        tmp_path,
        """
        import torch
        torch.manual_seed(0)
        net, made = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)), {}
        for _ in range(6):
            net(torch.randn(8, 2)).square().mean().backward()
            for p in net.parameters():
                made.setdefault(p, torch.optim.SGD([p], lr=0.1)).step()
            net.zero_grad()
        """,
    )
    ((_, run),) = runs.items()
    assert [s.step for s in run.snapshots] == [*range(6)]
    assert all(None not in s.norm for s in run.snapshots)


def test_what_is_in_no_module_and_modules_that_are_in_none_together_go_by_the_programs_own_names(tmp_path):
    _, runs = recorded(
        tmp_path,
        """
        import torch
        encoder, decoder, temperature = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1), torch.ones((), requires_grad=True)
        optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters(), temperature], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (decoder(encoder(torch.ones(1, 2))) * temperature).sum().backward()
            optimizer.step()
        """,
    )
    ((_, run),) = runs.items()
    names = [p.name for p in run.snapshots[-1].model.parameters]
    assert sorted(names) == ["decoder.bias", "decoder.weight", "encoder.bias", "encoder.weight", "temperature"]


def test_a_model_that_the_collector_has_been_told_to_leave_alone_is_found_too(tmp_path):
    ended, runs = recorded(
        tmp_path,
        """
        import gc, torch
        body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        frozen = gc.get_freeze_count()
        gc.freeze()
        optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
        print(gc.get_freeze_count() > frozen)
        for _ in range(3):
            optimizer.zero_grad()
            body(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
        print(gc.get_freeze_count() > frozen)
        """,
    )
    ((name, run),) = runs.items()
    assert "gradwatch-Sequential" in name
    assert [p.name for p in run.snapshots[-1].model.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert ended.out == "True\nTrue\n"


def test_the_loss_is_told_without_the_loss_scale_and_without_what_was_thrown_away(tmp_path):
    _, runs = recorded(
        tmp_path,
        """
        import torch
        net = torch.nn.Linear(2, 1)
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            optimizer.zero_grad()
            loss = net(torch.ones(1, 2)).sum() * 0 + step
            if step == 2:
                loss = loss + float("inf") * net.weight.sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        """,
    )
    ((_, run),) = runs.items()
    assert [s.loss for s in run.snapshots] == [0.0, 1.0, 3.0, 4.0, 5.0]


def test_where_the_closure_runs_inside_of_the_step_the_gradients_are_those_of_the_step(tmp_path):
    _, runs = recorded(
        tmp_path,
        """
        import torch
        w = torch.nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(w.parameters(), lr=0.0)
        for step in range(1, 5):
            def closure():
                optimizer.zero_grad()
                loss = step * w(torch.ones(1, 1)).sum()
                loss.backward()
                return loss
            optimizer.step(closure)
        """,
    )
    ((_, run),) = runs.items()
    assert [s.norm[0] for s in run.snapshots] == [1.0, 2.0, 3.0, 4.0]
    assert all(s.loss is not None for s in run.snapshots)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import subprocess", "nothing was trained here: torch was not imported\n"),
        (
            "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', ''])",
            "nothing was trained here: torch was not imported; what other processes do is not seen: call",
        ),
        (
            "import subprocess, sys; left = subprocess.Popen([sys.executable, '-S', '-c', 'input()'], stdin=-1)",
            "nothing was trained here: torch was not imported; what other processes do is not seen: call",
        ),
        (
            """
            import torch, multiprocessing
            w = torch.ones(2, requires_grad=True)
            w = (w - torch.autograd.grad(w.sum(), [w])[0]).detach()
            """,
            "nothing was trained here: no backward() was called, and no optimizer of torch has stepped\n",
        ),
        (
            """
            import torch
            class FitOptimizer:
                def step(self): ...
            w, o = torch.ones(2, requires_grad=True), FitOptimizer()
            for _ in range(3):
                w.sum().backward()
            """,
            "3 backward passes were made and no optimizer of torch has stepped. There is: __main__.FitOptimizer.",
        ),
    ],
)
def test_where_no_optimizer_of_torch_steps_it_says_so(tmp_path, source, said):
    ended, runs = recorded(tmp_path, source)
    assert f"gradwatch: {said}" in ended.err
    assert runs == {}


def test_a_program_that_watches_itself_is_not_watched_twice(tmp_path):
    source = TRAINING.replace(
        "truth = []", "import gradwatch; w = gradwatch.watch(net, optimizer, logdir='own'); truth = []"
    )
    ended, runs = recorded(tmp_path, source)
    assert runs == {}
    assert len(read_runs(tmp_path / "own")) == 1
    assert "nothing was trained" not in ended.err


def test_a_failure_of_ours_leaves_the_program_alone(tmp_path):
    write(tmp_path, "train.py", TRAINING)
    (tmp_path / "file").write_text("")
    ended = trains(tmp_path, *RUN, "--logdir", "file", "train.py")
    assert ended.code == 0
    assert ended.out == trains(tmp_path, "train.py").out
    assert "gradwatch: watching is switched off: NotADirectoryError" in ended.err


def test_a_model_that_is_trained_after_another_has_a_run_of_its_own(tmp_path):
    _, runs = recorded(
        tmp_path,
        """
        import torch
        def fit(width):
            net = torch.nn.Linear(width, 1)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for _ in range(width):
                net(torch.ones(1, width)).sum().backward()
                optimizer.step()
        for width in (2, 3, 4):
            fit(width)
        """,
    )
    assert sorted(len(run.snapshots) for run in runs.values()) == [2, 3, 4]


def test_torch_is_not_imported_before_the_program_does(tmp_path):
    ended, _ = recorded(tmp_path, "import sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    assert "nothing was trained here" in ended.err


PLAIN = """
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        loss = net(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
"""


def test_threads_that_train_have_runs_and_losses_of_their_own(tmp_path):
    _, runs = recorded(
        tmp_path,
        """
        import threading, torch
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        def train(width):
            net = torch.nn.Linear(width, 1)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
            for _ in range(40):
                optimizer.zero_grad()
                (net(torch.ones(1, width)).sum() * 0 + width).backward()
                optimizer.step()
        threads = [threading.Thread(target=train, args=(width,)) for width in (2, 3, 4, 5)]
        for thread in threads:
            thread.start()
        """,
    )
    told = {run.snapshots[0].model.parameters[0].shape[1]: {s.loss for s in run.snapshots} for run in runs.values()}
    assert told == {width: {float(width)} for width in (2, 3, 4, 5)}
    assert {len(run.snapshots) for run in runs.values()} == {40}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("loss.backward()", "torch.autograd.backward(part for part in [loss])"),
        ("torch.optim.SGD(", "Unhashable("),
        ("for step", "sys.stderr.close()\n    for step"),
        ("for step", "sys.stderr = None\n    for step"),
        ("for step", "import os, tempfile; os.chdir(tempfile.mkdtemp())\n    for step"),
        ("for step", "lazy = torch.nn.ModuleList([net, torch.nn.LazyLinear(3)])\n    for step"),
        pytest.param(
            "loss.backward()",
            "torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones(()))",
            marks=pytest.mark.skipif(TORCH < (2, 7), reason="torch takes no edges here before 2.7"),
        ),
    ],
)
def test_whatever_a_program_does_it_trains_and_is_watched(tmp_path, before, after):
    start = """
    import sys, torch
    class Unhashable(torch.optim.SGD):
        __hash__ = None
"""
    source = (
        start
        + PLAIN.replace(before, after)
        + "    print(float(loss.detach()), [p.sum().item() for p in net.parameters()])\n"
    )
    source = source.replace("import sys, torch\n", "import sys, torch\n    torch.manual_seed(0)\n")
    write(tmp_path, "alone.py", source)
    ended, runs = recorded(tmp_path, source)
    assert ended.out == trains(tmp_path, "alone.py").out != ""
    (run,) = runs.values()
    assert [s.step for s in run.snapshots] == [*range(6)]


def test_where_each_round_makes_an_optimizer_the_old_ones_can_go(tmp_path):
    ended, runs = recorded(
        tmp_path,
        """
        import gc, torch, weakref
        net, made = torch.nn.Linear(4, 2), []
        for _ in range(20):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            made.append(weakref.ref(optimizer))
            net(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        gc.collect()
        print(sum(one() is not None for one in made))
        """,
    )
    assert int(ended.out) <= 8
    assert sum(len(run.snapshots) for run in runs.values()) == 20


def test_scores_that_the_loss_squashes_once_more_are_seen(tmp_path):
    source = """
        import torch
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(-1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            optimizer.step()
    """
    _, runs = recorded(tmp_path, source)
    (run,) = runs.values()
    assert [(a.finding.code, a.finding.place) for a in run.alerts] == [("GW104", "1")]
