"""Measurement of a model behind a server on the CPU: several callers, threads or processes, neighbors, batches that change.

    models      the contenders, each a model that several callers share, and the gate before any time
    loops       closed loops: callers as threads of this process
    workers     the same in processes of their own; a busy neighbor
    plot        images per second and p99 latency over the number of callers

The command is `python -m benchmarks.tools.serving`.
"""
