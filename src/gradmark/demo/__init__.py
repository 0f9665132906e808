"""``gradmark demo``, and the small network and settings that it uses."""

from gradmark.bench.networks import DigitsNet
from gradmark.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "DigitsNet", "run_demo"]
