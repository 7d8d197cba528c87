"""`vg ops`: report the kernels that run on this machine."""

from __future__ import annotations

import argparse

from vg.cli.arguments import Verbs


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser("ops", help="print which kernels run on this machine and why; build them if needed")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from vg.ops import backend_info

    for device, backend in backend_info().items():
        print(f"deform_attn on {device}: {backend.name} ({backend.reason})")
