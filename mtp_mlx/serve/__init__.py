"""`mtp-mlx serve`: an HTTP server for one model with OpenAI- and Anthropic-compatible APIs (extra `[serve]`).

app.py           routes, access control, size limits
openai_api.py    OpenAI's requests       turns.py            their messages        openai_answers.py     responses
anthropic_api.py Anthropic's requests    anthropic_turns.py  their messages        anthropic_answers.py  responses
tools.py         tools of a request                      effort.py         how much a request wants the model to think
fields.py        checked access to JSON fields           prompts.py        token ids and limits of a request
request.py       requests to the engine, and its events
engine.py        the thread that owns the model: queue, turns, cancellation
batch.py         forward passes shared by requests       batch_plan.py     the layout of shared passes
sequence.py      one request being answered              prefix_cache.py   KV caches kept for later requests
grammar.py       JSON schema as a constraint on tokens   metrics.py        counters for Prometheus
"""
