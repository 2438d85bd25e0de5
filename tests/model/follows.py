"""Another machine that trains with the one that leads: `follows.py <address> <secret> <folder>`."""

import logging
import sys
from pathlib import Path

import torch

from model.machines import Meeting, follow

logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
follow(Meeting.at(sys.argv[1], machines=2, secret=sys.argv[2].encode(), folder=Path(sys.argv[3])))
