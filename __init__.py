"""Glimmer: a server for GLM-4.7-Flash.

frontend/   HTTP: text in, text out          scheduler/  which tokens run in which step
workers/    one GPU (or CPU) rank: the model  kernels/    the ops it is made of
shared/     what all processes agree on       deploy/     the CLI, the launcher, how to operate it
"""

__version__ = "0.1.0"

# `glimmer.server.api_server`, which launch scripts for LightLLM name, lies in this folder.
__path__.append(f"{__path__[0]}/deploy/lightllm")
