"""The doctor looks at the machine it runs on: its lines are checked against other sources of the same facts."""

import json
import os

import pytest
import torch

from serving import doctor

pytestmark = pytest.mark.cpu


def test_reports_what_this_machine_has(capsys):
    status = doctor.main(["--json"])
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["detail"] == torch.__version__
    assert findings["cores"]["detail"].startswith(f"{len(os.sched_getaffinity(0))} usable")
    assert ("gpu" in findings) != torch.cuda.is_available()
    assert status == int(any(finding["verdict"] == "missing" for finding in findings.values()))


def test_a_missing_package_is_named_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    assert doctor.main([]) == 1
    assert "missing  no-such-package" in capsys.readouterr().out
