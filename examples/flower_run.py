"""A local Flower simulation of real training; a strategy records one client's update, which is attacked.

pip install 'gradleak[flower]'
python examples/flower_run.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import mkdtemp

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradleak
from gradleak import LocalTraining, Observation

LR, STEPS, CLIENTS = 0.1, 2, 2
RECORD = Path(mkdtemp(prefix="flower-")) / "update.safetensors"


def network() -> nn.Module:
    """Return the model that the server sends in the first round."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))


def private(partition: int) -> tuple[Tensor, Tensor]:
    """Return the images of one client, one of them here."""
    digits = load_digits()
    image, label = digits.images[partition : partition + 1, None] / 16, digits.target[partition : partition + 1]
    return torch.tensor(image, dtype=torch.float32), torch.tensor(label)


client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take local steps from the weights that the server sent, and send the weights after them."""
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = private(int(context.node_config["partition-id"]))
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    who = MetricRecord({"num-examples": len(images), "partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": who}), reply_to=message)


class Recording(FedAvg):
    """FedAvg of a server that keeps what the client of partition 0 sent: its weights minus those that it got."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Record, then aggregate as ever."""
        replies = list(replies)
        for reply in replies:
            if reply.has_content() and reply.content["metrics"]["partition"] == 0 and server_round == 1:
                after, before = reply.content["arrays"].to_torch_state_dict(), network().state_dict()
                save_file({name: (after[name] - tensor).contiguous() for name, tensor in before.items()}, RECORD)
        return super().aggregate_train(server_round, replies)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run one round."""
    strategy = Recording(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(network().state_dict()), num_rounds=1)


def main() -> float:
    """Run the simulation, attack what was recorded, and return the PSNR in dB of what came back."""
    run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS)
    local = LocalTraining(steps=STEPS, lr=LR)
    observation = Observation.of(network(), load_file(RECORD), (1, 8, 8), local=local)
    found = gradleak.attack(observation, "gauss-newton", restarts=2)
    print(*found.lines(), sep="\n")
    psnr = float(-10 * (found.images[0] - private(0)[0]).square().mean().log10())
    print(f"the image came back with {psnr:.1f} dB")
    return psnr


if __name__ == "__main__":
    main()
