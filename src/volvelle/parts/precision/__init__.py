"""Mixed precision after Micikevicius et al. 2018: number formats, loss scaling, FP32 master weights."""
