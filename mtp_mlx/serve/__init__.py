"""`mtp-mlx serve`: OpenAI's and Anthropic's HTTP interfaces in front of one model (extra `[serve]`).

app.py           routes, who may ask, limits on what is read
openai_api.py    JSON of OpenAI's requests and answers        anthropic_api.py  the same for Anthropic's
engine.py        the one thread that owns the model: queue, turns, cancellation
sequence.py      one request being answered                   prefix_cache.py   keys and values kept for later ones
grammar.py       JSON schema as a constraint on tokens        metrics.py        counts for Prometheus
"""
