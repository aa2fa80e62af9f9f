"""Commands beside the benchmarks: the pages' tables, costs, image sizes, interference, trimming of result files."""
