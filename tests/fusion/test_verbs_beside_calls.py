"""Calls of a model in some threads while fuse_, unfuse_ and explain work on it in others."""

import copy
import sys
import threading
import time

import pytest
import torch
from torch import nn

import resnet_kernels as rk

SECONDS = 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_calls_beside_fuse_unfuse_and_explain_give_the_models_result():
    torch.manual_seed(0)
    net = rk.models.ResNet(rk.models.resnet_v1.BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
    plain, x = copy.deepcopy(net), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = plain(x)
    module_call = nn.Module.__call__
    errors, calls, end = [], [0], time.monotonic() + SECONDS
    interval = sys.getswitchinterval()

    def caller():
        with torch.no_grad():
            while time.monotonic() < end and not errors:
                try:
                    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-4)
                    calls[0] += 1
                except BaseException as error:
                    errors.append(error)

    def editor(*verbs):
        while time.monotonic() < end and not errors:
            for verb in verbs:
                try:
                    verb(net)
                except BaseException as error:
                    errors.append(error)

    threads = [threading.Thread(target=caller) for _ in range(2)]
    threads += [threading.Thread(target=editor, args=verbs) for verbs in ((rk.fuse_, rk.unfuse_), (rk.explain,))]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, errors[0]
    assert calls[0] and nn.Module.__call__ is module_call
    rk.unfuse_(net)
    assert type(net) is type(plain) and [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]


def test_two_threads_that_fuse_different_models_both_have_the_right_report():
    models = [rk.models.ResNet(rk.models.resnet_v1.BasicBlock, [1, 1, 1, 1], num_classes=4).eval() for _ in range(6)]
    expected, reports = str(rk.explain(models[0])), {}

    def fuse(i):
        reports[i] = str(rk.fuse_(models[i]))

    threads = [threading.Thread(target=fuse, args=(i,)) for i in range(1, len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == len(models) - 1 and set(reports.values()) == {expected}
