"""A server in one process: callers hand in single images, and a thread answers them in batches.

A batch has up to --max-batch images, or those that came within --max-wait-ms. On a GPU the network is captured as CUDA
graphs, one for each power of two; on a CPU it is frozen, and rk.capture returns it as it is.

    python docs/examples/serving.py
    python docs/examples/serving.py --model resnet50 --image-size 224 --callers 16 --images 50 --max-batch 16
"""

import argparse
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

import resnet_kernels as rk


class Server:
    """Runs a model on batches of the images that callers submit.

    Args:
        run: the model: (N, C, H, W) -> (N, classes).
        device: its device.
        max_batch: most images of a batch.
        max_wait: seconds to wait for more images after a batch's first one.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], device: torch.device, max_batch: int, max_wait: float):
        self.run, self.device, self.max_batch, self.max_wait = run, device, max_batch, max_wait
        self.batches: list[int] = []
        self._requests: queue.Queue[tuple[Tensor, Future] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, image: Tensor) -> Future:
        """Takes an image, (C, H, W); the future has the result's row."""
        answer: Future = Future()
        self._requests.put((image, answer))
        return answer

    def close(self) -> None:
        """Answers what was submitted, then ends the thread."""
        self._requests.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._requests.get()) is not None:
            batch, deadline, last = [first], time.monotonic() + self.max_wait, False
            while len(batch) < self.max_batch and not last:
                try:
                    request = self._requests.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if request is None:
                    last = True
                else:
                    batch.append(request)
            self._answer(batch)
            if last:
                return

    def _answer(self, batch: list[tuple[Tensor, Future]]) -> None:
        self.batches.append(len(batch))
        try:
            x = torch.stack([image for image, _ in batch]).to(self.device).contiguous(memory_format=torch.channels_last)
            if self.device.type == "cuda":
                # A graph is of one shape: with powers of two a few graphs serve all batches.
                x = torch.cat([x, x.new_zeros(padded(len(batch)) - len(batch), *x.shape[1:])])
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                rows = self.run(x).cpu()
            for row, (_, answer) in zip(rows, batch):
                answer.set_result(row)
        except Exception as error:  # callers get it, and the next batch is answered
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)


def padded(n: int) -> int:
    """Returns the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name of rk.models (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--images", type=int, default=6, help="of each caller (default: 6)")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--max-wait-ms", type=float, default=5.0)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = getattr(rk.models, options.model)().eval().to(device, memory_format=torch.channels_last)
    images = torch.randn(options.callers, options.images, 3, options.image_size, options.image_size)
    fused = rk.fuse(model, freeze=True)
    result = rk.verify(model, fused, images[0, :2].to(device))
    print(f"parity: {bool(result)}")
    if not result:
        raise SystemExit(str(result))

    # What takes long comes before the first request: packing, and on a GPU the capture of each batch size.
    run: Callable[[Tensor], Tensor] = fused
    for n in {padded(n) for n in range(1, options.max_batch + 1)}:
        x = torch.zeros(n, 3, options.image_size, options.image_size, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        if run is fused:
            run = rk.capture(fused, x)
        with torch.inference_mode():
            run(x)

    server = Server(run, device, options.max_batch, options.max_wait_ms / 1000)
    with torch.inference_mode():
        expected = model(images.flatten(0, 1).to(device)).cpu().unflatten(0, images.shape[:2])
    latencies: list[float] = []
    differences: list[float] = []

    def caller(index: int) -> None:
        for image, row in zip(images[index], expected[index]):
            start = time.perf_counter()
            answer = server.submit(image).result()
            latencies.append(time.perf_counter() - start)
            differences.append(((answer - row).norm() / row.norm()).item())

    start = time.perf_counter()
    with ThreadPoolExecutor(options.callers) as pool:
        list(pool.map(caller, range(options.callers)))
    seconds = time.perf_counter() - start
    server.close()

    latencies.sort()
    p50, p99 = (1000 * latencies[min(len(latencies) - 1, int(share * len(latencies)))] for share in (0.5, 0.99))
    print(f"{len(latencies)} images in {len(server.batches)} batches of {min(server.batches)} to {max(server.batches)}")
    print(f"{len(latencies) / seconds:.0f} images/s, latency {p50:.1f} ms (median), {p99:.1f} ms (99th percentile)")
    print(f"largest relative difference from the plain model's answer: {max(differences):.1e}")


if __name__ == "__main__":
    main()
