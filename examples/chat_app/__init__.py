"""A chat window with native widgets (Toga): text streams from a background thread and can be stopped.

pip install toga
python -m examples.chat_app --model smollm2-135m
"""
