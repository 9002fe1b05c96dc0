"""What the scripts of `benchmarks/` share, beside the experiments, which are YAML files."""
