"""Files that kadr wrote before they had schema numbers, at commit 0906cac; they must stay readable.

video.mp4           kadr generate "a red circle" --model demo --size 64x64 --frames 9 --steps 2 --seed 3 --device cpu
clip.windows        the first window of a long video on the tiny model, interrupted in the second
state.safetensors   a LoRA of the tiny model, interrupted after 2 of 4 steps
transformer.gguf    the tiny model, quantized to Q8_0
"""

from __future__ import annotations

from pathlib import Path

STORED_FILES = Path(__file__).parent / "data" / "before_schema_numbers"
