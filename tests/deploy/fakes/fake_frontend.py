"""A frontend that opens the port and answers every connection with one demo stream."""

import socket
import sys
import threading

from glimmer.shared.lifecycle import run_child, start_child
from glimmer.shared.messages import PeerLost, Progress, Ready, Reload, Reloaded, Shutdown
from glimmer.shared.transport import Receiver, Sender, frontend_address, scheduler_address

STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "a fake"}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": " answer"}}]}\n\ndata: [DONE]\n\n'
)


RUDE = b"HTTP/1.1 503 No\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy"


def answer_all(listener: socket.socket, reply: bytes) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(reply)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):  # closed with bytes unread, it would be reset
                pass


def main() -> int:
    child = start_child("frontend")
    reply = RUDE if child.config.model_owner == "rude-frontend" else STREAM
    listener = socket.socket(fileno=child.listen_fd)
    scheduler = Sender.connect(scheduler_address(child.runtime_dir))
    with Receiver.bind(frontend_address(child.runtime_dir, child.index)) as inbox:
        scheduler.send(child.hello())
        while True:
            if child.config.model_owner != "mute-frontend":
                child.launcher.send(Progress("frontend", child.index, "running"))
            for message in inbox.receive(0.5):
                match message:
                    case Ready():
                        if not threading.active_count() > 2:
                            listener.listen()
                            threading.Thread(
                                target=answer_all, args=(listener, reply), daemon=True
                            ).start()
                        child.launcher.send(Ready("frontend", child.index))
                    case PeerLost() | Reload():
                        print(f"frontend told: {message}", file=sys.stderr, flush=True)
                        if isinstance(message, Reload):
                            child.launcher.send(Reloaded(child.index))
                    case Shutdown(drain_s):
                        print(f"frontend told: {message}", file=sys.stderr, flush=True)
                        if drain_s == 0 or child.config.model_owner != "slow-streams":
                            return 0


if __name__ == "__main__":
    sys.exit(run_child(main))
