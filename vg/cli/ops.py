"""`vg ops`: print which kernels run on this machine."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> None:
    from vg.ops import backend_info

    for device, backend in backend_info().items():
        print(f"deform_attn on {device}: {backend.name} ({backend.reason})")
