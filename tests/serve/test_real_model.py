"""Over loopback the demo model writes what `mtp-mlx generate` prints at the same seed, through both clients."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

import mtp_mlx.cli as cli
from mtp_mlx.cli.serve import ServeSettings, application
from mtp_mlx.files import cache_dir
from tests.serve.running import served

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
FOLDERS = list((cache_dir() / "models").glob("smollm2-135m-*"))
QUESTION, TOKENS = "Name three colours and say where each is seen.", 10

pytestmark = pytest.mark.skipif(
    not FOLDERS or "MTP_MLX_CACHE" in os.environ, reason="the demo model is not in the cache"
)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_demo_model(temperature: float) -> None:
    options = ["--layout", "quadratic", "--slots", "2", "--seed", "11", "--temp", str(temperature)]
    command = ["generate", "-p", QUESTION, "-n", str(TOKENS), "--json", *options]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 0, result.output
    text = json.loads(result.stdout)["text"]
    app = application(ServeSettings(layout="quadratic", drafts=2), None)
    messages = [{"role": "user", "content": QUESTION}]
    asked = {"model": "smollm2-135m", "messages": messages, "max_tokens": TOKENS}
    sampling = {"seed": 11, "temperature": temperature}
    with served(app) as port:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as gpt:
            answer = gpt.chat.completions.create(**asked, **sampling)
            chunks = list(gpt.chat.completions.create(**asked, **sampling, stream=True))
        with anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="-", max_retries=0) as claude:
            message = claude.messages.create(**asked, extra_body=sampling)
    assert answer.choices[0].message.content == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert message.content[0].text == text
    assert answer.mtp["drafted_by"].get("slots", 0) > 0
