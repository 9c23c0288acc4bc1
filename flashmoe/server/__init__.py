"""`flashmoe serve`: the OpenAI-compatible HTTP API over one LLM, with its metrics and its web page.

app.py wires it; serve.py runs it. A request's way: protocol.py (time limits, connections), security.py (who
may ask), chat.py or completions.py (what is asked), generations.py (to the computing thread and back),
sse.py.
"""
