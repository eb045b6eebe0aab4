"""`python -m glimmer.workers --runtime_dir D --index RANK --epoch E`: one tensor-parallel rank."""

from ..shared.lifecycle import run_child, start_child
from ..shared.transport import end_process


def main() -> int:
    """Greet the launcher first: importing torch takes a while."""
    child = start_child("worker")
    from .loop import run_worker

    return run_worker(child)


if __name__ == "__main__":
    # An interpreter's end takes objects down in any order. NCCL's communicators wait until CUDA
    # graphs that use them are gone, which has hung.
    end_process(run_child(main))
