"""Commands beside the benchmarks: README's tables, costs, image sizes, interference, trimming of result files."""
