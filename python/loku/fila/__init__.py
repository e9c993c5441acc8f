"""FILA: LoRA adapters that start from what matters most for the forget set relative to the retain set.

model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
state = get_fila_state_dict(model, forget_dataloader, retain_dataloader)   # the expensive part
state.save("fila.safetensors")                                             # one number a row, a few megabytes
initialize_lora_fila_weights(model, state)
...                                                                        # train
save_fila_adapter(model, "adapter")                                        # loads with PEFT on the unmodified base
"""

from loku.fila.checkpoint import ImportanceCheckpoint
from loku.fila.config import FilaConfig
from loku.fila.importance import get_fila_state_dict
from loku.fila.initialise import initialize_lora_fila_weights
from loku.fila.relative_importance import row_weights
from loku.fila.saving import load_fila_adapter, save_fila_adapter, save_merged
from loku.fila.state import FilaStateDict

__all__ = [
    "FilaConfig",
    "FilaStateDict",
    "ImportanceCheckpoint",
    "get_fila_state_dict",
    "initialize_lora_fila_weights",
    "load_fila_adapter",
    "row_weights",
    "save_fila_adapter",
    "save_merged",
]
