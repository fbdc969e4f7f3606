"""Training by the LayerSkip recipe. Start at `loop.py`; `losses.py` is what one step computes."""

from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.loop import TrainResult, train
from layerskip_moe.training.losses import Losses, training_losses

__all__ = ["Losses", "TrainConfig", "TrainResult", "train", "training_losses"]
