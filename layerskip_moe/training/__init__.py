"""Training by the LayerSkip recipe. Start at `loop.py`; `losses.py` is what one step computes."""

from layerskip_moe.training.checkpoint import finish_run, has_checkpoint
from layerskip_moe.training.config import TrainConfig
from layerskip_moe.training.loop import TrainResult, train
from layerskip_moe.training.losses import Losses, training_losses
from layerskip_moe.training.run_folder import check_new_run

__all__ = [
    "Losses",
    "TrainConfig",
    "TrainResult",
    "check_new_run",
    "finish_run",
    "has_checkpoint",
    "train",
    "training_losses",
]
