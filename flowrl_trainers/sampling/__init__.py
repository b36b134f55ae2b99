"""How pictures are drawn, scored and measured. Knows no algorithm, no trainer and no configuration."""
