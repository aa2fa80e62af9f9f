"""A network that trains in a second, known to the command line as `tiny`; and a process that has it."""

import sys

import resnet_kernels as rk
from resnet_kernels import __main__ as cli

NAME = "tiny"
TRAIN = ["train", "--model", NAME, "--image-size", "16", "--device", "cpu"]


def tiny(num_classes: int, in_channels: int):
    return rk.models.d2l_resnet18(in_channels, num_classes, width=8, num_blocks=(1, 1))


def main(arguments):
    rk.models.BY_NAME[NAME] = tiny
    return cli.main(arguments)


if __name__ == "__main__":
    # Several commands, one after the other, where they are separated by "then".
    commands = [[]]
    for argument in sys.argv[1:]:
        if argument == "then":
            commands.append([])
        else:
            commands[-1].append(argument)
    sys.exit(max(main(command) for command in commands))
