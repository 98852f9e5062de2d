"""`mtp-mlx serve`: an HTTP server for one model with OpenAI- and Anthropic-compatible APIs (extra `[serve]`).

app.py            routes, access control, size limits
openai_api.py     OpenAI's chat completions and completions; turns.py: its messages; openai_answers.py: its responses
responses_api.py  OpenAI's responses API; responses_turns.py: its items; responses_answers.py: its responses
anthropic_api.py  Anthropic's messages API; anthropic_turns.py: its messages; anthropic_answers.py: its responses
fields.py         checked access to JSON fields           prompts.py        token ids and limits of a request
tools.py          tools of a request                      effort.py         how much the model is to think
request.py        requests to the engine, and its events  sequence.py       one request being answered
engine.py         the thread that owns the model: queue, turns, cancellation
batch.py          forward passes shared by requests       batch_plan.py     the layout of shared passes
batch_generate.py texts of several prompts at once, without a server; batch_texts.py: what is asked for and returned
grammar.py        JSON schema as a constraint on tokens   prefix_cache.py   KV caches kept for later requests
prefix_text.py    one text of them, and its states        prefix_files.py   the same on disk
contents.py       texts in messages and in results        counts.py         what /metrics counts
orders.py         what the engine does in its next turn, alone or with other processes
metrics.py        counters for Prometheus
"""
