"""Stage 1: is each rank's machine fit, and like the others'?

In: the config and the device of a rank. Out: a `Report` of host, versions, device, environment and config; what differs
between ranks; the rows of the table.
"""

import os
import platform
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import cce_dist
from cce_dist.tools.doctor.config import check_config
from cce_dist.tools.doctor.reports import Faults, Report, minority, ranks_text

_PACKAGES = ("triton", "deepspeed", "transformers", "accelerate", "pydantic")


def versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {"cce_dist": cce_dist.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def examine(config: Path | None, world: int, device: torch.device) -> Report:
    faults: Faults = []
    warnings: Faults = []
    notes: Faults = []
    facts: dict[str, Any] = {"host": socket.gethostname(), "versions": versions(), "device": "cpu", "place": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"device": properties.name, "place": str(getattr(properties, "uuid", device)), "free": free / total}
        facts["memory"] = total
        if free < 0.9 * total:
            used = f"{(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB are in use before the run"
            warnings.append(("device", f"{used}; nvidia-smi shows by whom."))
        if not dist.is_nccl_available():
            faults.append(("device", f"this build of torch {torch.__version__} has no NCCL; install a CUDA build."))
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            faults.append(("device", "TRITON_INTERPRET is set: kernels would be interpreted on the CPU. Unset it."))
    names = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    facts["environment"] = {key: value for key, value in sorted(os.environ.items()) if key.startswith(names)}
    if config is not None:
        checked = check_config(config, world, device)
        facts["config"], facts["digest"] = checked.summary, checked.digest
        faults += [("config", text) for text in checked.faults]
        notes += [("config", text) for text in checked.notes]
    return Report(facts, faults, warnings, notes)


def compare(reports: Mapping[int, Report]) -> tuple[Faults, Faults]:
    faults: Faults = []
    warnings: Faults = []
    for name in sorted({name for report in reports.values() for name in report.facts["versions"]}):
        said = {rank: report.facts["versions"].get(name, "none") for rank, report in reports.items()}
        odd = minority(said)
        if odd:
            faults.append(("versions", f"{name}: {odd}; install the same on every rank."))
    devices = minority({rank: report.facts["device"] for rank, report in reports.items()})
    if devices:
        warnings.append(("device", f"{devices}; the slowest sets the pace."))
    digests = minority({rank: report.facts.get("digest", "") for rank, report in reports.items()})
    if digests:
        faults.append(("config", f"{digests}, checksums of different files; copy one file to all nodes."))
    shared = defaultdict(list)
    for rank, report in reports.items():
        if report.facts["place"]:
            shared[report.facts["host"], report.facts["place"]].append(rank)
    for (host, _), ranks in shared.items():
        if len(ranks) > 1:
            text = f"{ranks_text(ranks)} share one GPU of {host}, over gloo: right for a trial, slow for a run."
            warnings.append(("device", f"{text} Start one rank per GPU."))
    return faults, warnings


def describe(reports: Mapping[int, Report]) -> list[tuple[str, str]]:
    hosts = defaultdict(list)
    for rank, report in reports.items():
        hosts[report.facts["host"]].append(rank)
    first = next(iter(reports.values())).facts
    layout = "; ".join(f"{host}: {ranks_text(ranks)}" for host, ranks in list(hosts.items())[:8])
    more = "" if len(hosts) <= 8 else f"; and {len(hosts) - 8} more hosts"
    devices = Counter(report.facts["device"] for report in reports.values())
    memory = f", {first['memory'] / 1e9:.0f} GB" if "memory" in first else ""
    rows = [
        ("ranks", f"{len(reports)} on {len(hosts)} host(s): {layout}{more}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in first["versions"].items())),
        ("device", ", ".join(f"{count} x {name}" for name, count in devices.items()) + memory),
    ]
    if first["environment"]:
        rows.append(("environment", " ".join(f"{key}={value}" for key, value in first["environment"].items())))
    if first.get("config"):
        rows.append(("config", first["config"]))
    return rows
