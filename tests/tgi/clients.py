"""Asks a service through huggingface_hub's and OpenAI's clients: argument {"url", "text", "models"}, answer on stdout.

Run by TGI's Python, which has both.
"""

import json
import sys

import openai
from huggingface_hub import InferenceClient

task = json.loads(sys.argv[1])
found = {}
hub = InferenceClient(base_url=task["url"])
oai = openai.OpenAI(base_url=task["url"] + "/v1", api_key="-", max_retries=0)
messages = [{"role": "user", "content": task["text"]}]
for model in task["models"]:
    chat = hub.chat_completion(messages, model=model, max_tokens=6)
    pieces = oai.chat.completions.create(messages=messages, model=model, max_tokens=6, stream=True)
    whole = oai.completions.create(prompt=task["text"], model=model, max_tokens=6)
    found[model] = [
        chat.choices[0].message.content,
        "".join(piece.choices[0].delta.content or "" for piece in pieces),
        whole.choices[0].text,
    ]
try:
    oai.chat.completions.create(messages=messages, model="nobody", max_tokens=6)
except openai.NotFoundError as error:
    found["nobody"] = error.body["message"]
found["models"] = [model.id for model in oai.models.list()]
print(json.dumps(found))
