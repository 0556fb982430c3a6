"""The parts of `benchmarks/sign_report.py`: a network's figures, its cost, the ablation and the toy densities."""
