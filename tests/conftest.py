"""One thread: tiny models are no faster on more, and test processes side by side would fight over the cores."""

import torch

torch.set_num_threads(1)
