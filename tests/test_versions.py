import os

from trl_diffusion_rank.versions import hardware, package_versions


def test_hardware_of_a_machine_without_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = hardware()
    assert machine["gpus"] == []
    assert 1 <= machine["cpu_cores"] <= os.cpu_count()
    assert machine["memory_gb"] > 0 and machine["cpu"] and machine["platform"] and machine["python"]


def test_gpus_as_nvidia_smi_lists_them(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\necho 'NVIDIA A100-SXM4, 40960'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert hardware()["gpus"] == [
        {"name": "NVIDIA H200", "memory_gb": 140.4},
        {"name": "NVIDIA A100-SXM4", "memory_gb": 40.0},
    ]
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert hardware()["gpus"] == []


def test_versions_of_all_that_decides_a_result():
    versions = package_versions()
    assert versions["trl"].startswith("1.16") and versions["torch"][0].isdigit()
