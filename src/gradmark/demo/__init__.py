"""``gradmark demo``, and the small network and settings that it uses."""

from gradmark.demo.run import DemoResult, DigitsNet, run_demo

__all__ = ["DemoResult", "DigitsNet", "run_demo"]
