"""The shop of the built-in language model: dialogues about fixed facts, new manners of answering, and judges.

Everything is a function of its arguments: the same seed gives the same dialogues.
"""

from lora_scripts.builtin.dialogue_world.corpus import held_out_dialogues, pretraining
from lora_scripts.builtin.dialogue_world.judges import is_right, parses_as_json, reads_as_customer_service
from lora_scripts.builtin.dialogue_world.manners import json_dialogues, questions, service_dialogues
from lora_scripts.builtin.dialogue_world.talk import Asked, Message, Talk

__all__ = [
    "Asked",
    "Message",
    "Talk",
    "held_out_dialogues",
    "is_right",
    "json_dialogues",
    "parses_as_json",
    "pretraining",
    "questions",
    "reads_as_customer_service",
    "service_dialogues",
]
