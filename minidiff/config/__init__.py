"""Configuration: the only door to Hydra, and `build`, which turns a piece of configuration into an object.

`train.py` and `sample.py` compose a configuration from conf/ and the command line (`command`), check its scalars
(`ranges`), and make objects of its nodes (`build`); nothing behind them sees it. Configurations travel inside
checkpoints, so they are data.
"""

from minidiff.config.build import build
from minidiff.config.command import CONF, compose, entry, write_yaml
from minidiff.config.ranges import SAMPLE_RANGES, TRAIN_RANGES, check, check_name

__all__ = ["CONF", "SAMPLE_RANGES", "TRAIN_RANGES", "build", "check", "check_name", "compose", "entry", "write_yaml"]
