"""What the machine is called, and what it computes fast in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ivtp.files.machine import is_bfloat16_fast, processor_name

CPU = torch.device("cpu")


def instructions(monkeypatch: pytest.MonkeyPatch, *, bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("bf16", "amx", "processor", "fast"),
    [
        (False, False, "AMD EPYC", False),
        (True, False, "AMD EPYC", True),
        (True, False, "Intel(R) Xeon(R) Processor", False),
        (True, True, "Intel(R) Xeon(R) Processor", True),
    ],
)
def test_bfloat16_is_used_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, processor: str, fast: bool
) -> None:
    instructions(monkeypatch, bf16=bf16, amx=amx)
    assert is_bfloat16_fast(CPU, processor) is fast


def test_gpus_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    instructions(monkeypatch, bf16=False, amx=False)
    assert is_bfloat16_fast(torch.device("cuda"))


def test_the_name_is_the_model_name_of_the_first_core(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9V74\nflags\t\t: fpu\nmodel name\t: other\n")
    assert processor_name(info) == "AMD EPYC 9V74"
    assert processor_name(tmp_path / "none")
