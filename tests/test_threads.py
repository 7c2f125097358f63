"""The operators in several threads and processes, and where nothing can be cached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import smoothops as so

pytest.importorskip("smoothops.kernels.cpu", reason="numba cannot be imported")


def work(seed: int) -> Tensor:
    x = torch.randn(8, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y = so.rank(x, smoothing=0.1) * so.sort(x) + so.topk_mask(x, 3)
    return torch.autograd.grad((y * torch.arange(300.0)).sum(), x)[0]


def test_four_threads_at_once() -> None:
    expected = [work(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for ours, alone in zip(pool.map(work, range(16)), expected, strict=True):
            assert torch.equal(ours, alone)


def run(code: str, *, folder: Path | None = None, **environment: str) -> str:
    """The output of a new process in which smoothops is found in ``folder``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    folder = folder or Path(so.__file__).parents[1]
    env |= {"PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_use_from_four_threads() -> None:
    """Compilation, too, may start in several threads at once."""
    out = run(
        "import torch, smoothops as so\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "x = torch.randn(4, 9, 50)\n"
        "with ThreadPoolExecutor(4) as pool: ys = list(pool.map(so.rank, x)) + list(pool.map(so.sparsemax, x))\n"
        "print(all(map(torch.equal, ys, [so.rank(v) for v in x] + [so.sparsemax(v) for v in x])))"
    )
    assert out == "True\n"


def test_backward_in_another_thread() -> None:
    x = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
    c = torch.tensor([1.0, -2.0, 0.5])
    expected = torch.autograd.grad(so.rank(x, smoothing=1.0), x, c)[0]
    y = so.rank(x, smoothing=1.0)
    thread = threading.Thread(target=y.backward, args=(c,))
    thread.start()
    thread.join()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


class Ranked(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = torch.arange(20.0).mul(index + 1.7).sin().requires_grad_()
        return torch.autograd.grad(so.rank(x, smoothing=0.1), x, torch.arange(20.0))[0]


# Python 3.12 warns of any fork in a process with threads; that fork is what is tested here
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_data_loader_workers_after_fork() -> None:
    data = Ranked()
    expected = torch.stack([data[i] for i in range(len(data))])  # compiles in the parent
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=120)
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.full  # compiles every kernel anew, in another process
def test_without_a_writable_cache(tmp_path: Path) -> None:
    """Neither beside the sources nor in the user's cache folder can anything be written, not even by root."""
    package = tmp_path / "smoothops"
    shutil.copytree(Path(so.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package, *(p for p in package.rglob("*") if p.is_dir())):
        (folder / "__pycache__").touch()  # a file where a folder would have to be
    blocked = str(package / "__pycache__" / "none")
    code = (
        "import torch, smoothops as so\n"
        "from smoothops.kernels import cpu, cpu_threshold\n"
        "print(so.__file__, *(f._cache.__class__.__name__ for f in (cpu._pool_mean, cpu_threshold._solve)))\n"
        "print(so.rank(torch.tensor([5.0, 1.0, 2.0]), smoothing=2.0).tolist())\n"
        "print(so.sparsemax(torch.tensor([0.5, 0.0, -1.0])).tolist())"
    )
    out = run(code, folder=tmp_path, XDG_CACHE_HOME=blocked, HOME=blocked, LOCALAPPDATA=blocked)
    assert out.splitlines() == [
        f"{package / '__init__.py'} NullCache NullCache",
        "[3.0, 1.25, 1.75]",
        "[0.75, 0.25, 0.0]",
    ]
