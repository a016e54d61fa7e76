"""Serving over HTTP: OpenAI's API for texts. Wants the extra `serve` (FastAPI, uvicorn, prometheus-client)."""
