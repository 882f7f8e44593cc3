"""The device and the precision of a training, and why a GPU cannot be used.

A training of a large base does not fall back to the CPU by itself: it would take days, and its figures would be those
of another machine. The CPU is used for a small base, or where `fine_tune.device=cpu` names it.
"""

import ctypes
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orion_triage import processes
from orion_triage.errors import OrionError
from orion_triage.settings import FineTuneSettings

# The 450M takes 14 s a record on 2 cores (docs/budgets.md): 1,440 records are 5.5 hours, the 1.6B's are a day and more.
# The shipped base has 7 M.
LARGEST_ON_CPU = 100_000_000  # parameters
# The first driver that serves all releases of a CUDA major version (NVIDIA, "CUDA Compatibility").
_OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
HOW_TO_USE_ALL = "Use them with accelerate launch (docs/training.md, More than one GPU)."


@dataclass(frozen=True)
class Device:
    """`name` is torch's ("cpu", "cuda:0"), `precision` a name of FineTuneSettings; `notes` are for the user."""

    name: str
    precision: str
    notes: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def choose_device(settings: FineTuneSettings, parameters: int | None) -> Device:
    """The device of this process and the precision on it, for a base of so many parameters (None: unknown, large).

    Raises OrionError if a GPU is needed or asked for and none is usable; the error says why.
    """
    fault = None if settings.device == "cpu" else gpu_fault()
    if settings.device != "cpu" and not fault:
        return _on_gpu(settings)
    if fault and needs_gpu(settings, parameters):
        what = "fine_tune.device=gpu" if settings.device == "gpu" else f"a base of {in_millions(parameters)}"
        raise OrionError(f"{what} needs a GPU for the training, and none is usable: {fault[0]}.", fault[1])
    why = "as fine_tune.device says" if settings.device == "cpu" else "there is no usable GPU"
    instead = "" if settings.precision in ("auto", "float32") else f" instead of {settings.precision}"
    return Device("cpu", "float32", (f"trained on the CPU in float32{instead}: {why}",))


def needs_gpu(settings: FineTuneSettings, parameters: int | None) -> bool:
    """Whether a training of a base with so many parameters (None: unknown) is refused without a GPU."""
    return settings.device == "gpu" or (settings.device == "auto" and takes_days_on_cpu(parameters))


def takes_days_on_cpu(parameters: int | None) -> bool:
    return parameters is None or parameters > LARGEST_ON_CPU


def _on_gpu(settings: FineTuneSettings) -> Device:
    import torch

    notes = []
    name, here = processes.local_device(), processes.on_this_machine()
    used = {f"cuda:{number}" for number in range(here)} if here > 1 else {name}
    idle = [gpu for number in range(torch.cuda.device_count()) if (gpu := f"cuda:{number}") not in used]
    if idle:
        which = idle[0] if len(idle) == 1 else f"{idle[0]} to {idle[-1]}" if len(idle) > 2 else " and ".join(idle)
        what = "one process trains on one GPU" if here == 1 else f"{here} processes train on {here} GPUs"
        notes.append(f"{which} {'is' if len(idle) == 1 else 'are'} idle: {what}. {HOW_TO_USE_ALL}")
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16() else "float16"
    elif precision == "bfloat16" and not has_bfloat16():
        notes.append("this GPU has no bfloat16 arithmetic and emulates it: fine_tune.precision=float16 is faster")
    return Device(name, precision, tuple(notes))


def has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 (Ampere and later), not only emulates it."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def in_millions(parameters: int | None) -> str:
    return "unknown size" if parameters is None else f"{parameters / 1e6:,.0f} M parameters"


def gpu_fault() -> tuple[str, str] | None:
    """(Why torch cannot use a GPU here, what to do); None if it can."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver, and the fault says it
        if torch.cuda.is_available():
            return None
    by_name = "To train on the CPU all the same, set fine_tune.device=cpu."
    wanted = torch.version.cuda
    if wanted is None:
        kind = "ROCm" if torch.version.hip else "the CPU only"
        return f"torch {torch.__version__} is built for {kind}", f"Install the CUDA build of torch. {by_name}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden.strip() or hidden.strip().startswith("-")):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides all GPUs", f"Unset CUDA_VISIBLE_DEVICES. {by_name}"
    devices = bool(list(Path("/dev").glob("nvidia[0-9]*")))
    found, fix = driver_fault(wanted, _driver_cuda(), driver_version(), devices, hidden)
    return found, f"{fix} {by_name}"


def driver_fault(
    wanted: str, cuda: int, driver: str | None, has_devices: bool, visible: str | None = None
) -> tuple[str, str]:
    """What is wrong with the driver, and what to do.

    `wanted` is torch's CUDA ("13.0"), `cuda` what the driver serves (12040 for 12.4, 0: none), `driver` its version,
    `has_devices` whether /dev has a GPU, `visible` CUDA_VISIBLE_DEVICES.
    """
    major = int(wanted.split(".")[0])
    oldest = _OLDEST_DRIVER.get(major)
    needed = f"torch's CUDA {wanted}" + (f" needs driver {oldest} or newer" if oldest else " needs a newer driver")
    if cuda and cuda // 1000 < major:
        found = f"the NVIDIA driver{f' {driver}' if driver else ''} serves CUDA {cuda // 1000}.{cuda % 1000 // 10}"
        return f"{found}, and {needed}", f"Update the driver, or install torch for CUDA {cuda // 1000}."
    if driver and not has_devices:
        return (
            f"there is a driver ({driver}), and no GPU in /dev: a container started without its devices",
            "Start the container with --gpus all.",
        )
    if driver and visible:
        return (
            f"CUDA_VISIBLE_DEVICES={visible} names no GPU that can be used",
            "Unset CUDA_VISIBLE_DEVICES, or name GPUs that 'nvidia-smi -L' lists.",
        )
    if driver or cuda:
        return f"the NVIDIA driver {driver or ''} does not start: {_complaint()}", "Run nvidia-smi."
    return f"no NVIDIA driver was found ({needed})", "Train on a machine with a CUDA GPU."


def _driver_cuda() -> int:
    """The CUDA version that the driver serves, 12040 for 12.4; 0 if there is no driver (libcuda's own answer)."""
    version = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver, as it says itself; None if there is none."""
    with suppress(OSError):
        text = Path("/sys/module/nvidia/version").read_text(encoding="ascii")
        return text.strip()
    with suppress(OSError, IndexError):
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split("Kernel Module")[1].split()
        return next((word for word in words if word[0].isdigit()), None)
    return None


def _complaint() -> str:
    """What torch says when it starts CUDA."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "without a reason"
