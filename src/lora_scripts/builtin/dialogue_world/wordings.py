"""How customers ask and how the shop answers plainly.

`{s}` is what the question is about (a product, an order's number, a day), `{v}` the fact. Held-out wordings never occur
in pre-training: the model's figures are measured on them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ORDER_KINDS", "PRODUCT_KINDS", "SHOP_KINDS", "Kind"]


@dataclass(frozen=True)
class Kind:
    """The wordings of one kind of question.

    Attributes:
        train: full questions.
        held_out: full questions that pre-training never shows.
        later: questions about "it", after an earlier turn has named the product.
        later_held_out: the same, never shown in pre-training.
        answers: plain answers to full questions.
        later_answers: plain answers to questions about "it".
        none: answers where the fact is that there is none (sold out, closed).
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    later: tuple[str, ...] = ()
    later_held_out: tuple[str, ...] = ()
    later_answers: tuple[str, ...] = ()
    none: tuple[str, ...] = ()


PRODUCT_KINDS: dict[str, Kind] = {
    "price": Kind(
        train=(
            "How much is the {s}?",
            "What does the {s} cost?",
            "What is the price of the {s}?",
            "How much do you ask for the {s}?",
            "Tell me the price of the {s}.",
            "How many dollars is the {s}?",
            "How expensive is the {s}?",
            "What do I have to pay for the {s}?",
            "I want to buy the {s}. How much is it?",
            "Price of the {s}?",
            "Does the {s} cost a lot? How much?",
            "I need the price of your {s}.",
            "How much would the {s} cost me?",
            "Do you know what the {s} costs?",
            "Say what the {s} costs.",
            "How much do I have to pay for the {s}?",
        ),
        held_out=(
            "How much does the {s} cost?",
            "Can you tell me what the {s} costs?",
            "I would like to know the price of the {s}.",
            "How much do I pay for the {s}?",
        ),
        answers=("The {s} costs {v} dollars.", "The price of the {s} is {v} dollars."),
        later=("And how much is it?", "What does it cost?", "And the price?", "How many dollars is it?"),
        later_held_out=("How much does it cost?", "And what is the price?"),
        later_answers=("It costs {v} dollars.",),
    ),
    "colour": Kind(
        train=(
            "What colour is the {s}?",
            "Which colour does the {s} have?",
            "What is the colour of the {s}?",
            "Tell me the colour of the {s}.",
            "In which colour do you sell the {s}?",
            "Colour of the {s}?",
            "I cannot see the {s} well. What colour is it?",
            "What colour do you have the {s} in?",
            "Is the {s} red, blue or some other colour?",
            "I need to know which colour the {s} is.",
            "How would you describe the colour of the {s}?",
            "Do you know the colour of the {s}?",
            "What colour does the {s} have?",
        ),
        held_out=(
            "Which colour is the {s}?",
            "What colour does your {s} have?",
            "Can you tell me the colour of the {s}?",
            "I would like to know what colour the {s} is.",
        ),
        answers=("The {s} is {v}.", "The colour of the {s} is {v}."),
        later=("And what colour is it?", "Which colour does it have?", "And the colour?", "In which colour?"),
        later_held_out=("Which colour is it?", "And what is the colour?"),
        later_answers=("It is {v}.",),
    ),
    "material": Kind(
        train=(
            "What is the {s} made of?",
            "Which material is the {s}?",
            "What material do you use for the {s}?",
            "Tell me the material of the {s}.",
            "Is the {s} made of wood or of something else?",
            "Material of the {s}?",
            "Out of what is the {s} made?",
            "What kind of material is the {s} made from?",
            "I need to know the material of your {s}.",
            "From what do you make the {s}?",
            "Do you know what the {s} is made of?",
            "Which material does the {s} have?",
        ),
        held_out=(
            "What is the material of the {s}?",
            "Which material is the {s} made of?",
            "Can you tell me what the {s} is made of?",
            "I would like to know what material the {s} is.",
        ),
        answers=("The {s} is made of {v}.", "We make the {s} of {v}."),
        later=("And what is it made of?", "Which material is it?", "And the material?", "Out of what is it made?"),
        later_held_out=("What is it made of?", "And which material is it?"),
        later_answers=("It is made of {v}.",),
    ),
    "size": Kind(
        train=(
            "How big is the {s}?",
            "What size is the {s}?",
            "How long is the {s}?",
            "How large is the {s} in cm?",
            "Tell me the size of the {s}.",
            "Size of the {s}?",
            "How many cm is the {s}?",
            "Does the {s} fit in my car? How big is it?",
            "I need to know how large your {s} is.",
            "What size does the {s} have?",
            "Do you know how big the {s} is?",
            "I ask for the size of the {s}.",
        ),
        held_out=(
            "What is the size of the {s}?",
            "How large is the {s}?",
            "Can you tell me how big the {s} is?",
            "I would like to know the size of the {s}.",
        ),
        answers=("The {s} is {v} cm long.", "The size of the {s} is {v} cm."),
        later=("And how big is it?", "What size is it?", "And the size?", "How many cm is it?"),
        later_held_out=("How big is it?", "And what is the size?"),
        later_answers=("It is {v} cm long.",),
    ),
    "stock": Kind(
        train=(
            "How many of the {s} do you have?",
            "Is the {s} in stock?",
            "Do you have the {s} in stock?",
            "How many pieces of the {s} are left?",
            "Is the {s} sold out?",
            "Tell me how many of the {s} are left.",
            "Can I still get the {s}?",
            "Stock of the {s}?",
            "Are there any of the {s} left?",
            "How many of the {s} are on hand?",
            "I need to know if your {s} is in stock.",
            "Do you know if the {s} is in stock?",
            "Do you still have the {s}?",
            "How many of the {s} do you still have?",
        ),
        held_out=(
            "How many of the {s} are in stock?",
            "Do you still have the {s} in stock?",
            "Can you tell me if the {s} is in stock?",
            "I would like to know how many of the {s} are left.",
        ),
        answers=("We have {v} of the {s} in stock.", "There are {v} of the {s} left."),
        later=(
            "And is it in stock?",
            "How many are left?",
            "And the stock?",
            "Do you have it in stock?",
            "How many of it do you have?",
        ),
        later_held_out=("Is it in stock?", "And how many do you have?"),
        later_answers=("We have {v} in stock.",),
        none=("The {s} is sold out.", "We have 0 of the {s} in stock."),
    ),
    "delivery": Kind(
        train=(
            "How long does delivery of the {s} take?",
            "How many days does it take to deliver the {s}?",
            "When do I get the {s} if I order now?",
            "What is the delivery time of the {s}?",
            "Tell me the delivery time of the {s}.",
            "How fast can you deliver the {s}?",
            "Delivery time of the {s}?",
            "If I order the {s} today, when does it arrive?",
            "I need to know how fast the {s} is delivered.",
            "In how many days can the {s} be at my home?",
            "Do you know how long delivery of the {s} takes?",
            "How long do you take to deliver the {s}?",
        ),
        held_out=(
            "How long does it take to deliver the {s}?",
            "How many days does delivery of the {s} take?",
            "Can you tell me the delivery time of the {s}?",
            "I would like to know how fast you can deliver the {s}.",
        ),
        answers=("Delivery of the {s} takes {v} days.", "We deliver the {s} in {v} days."),
        later=(
            "And how long does delivery take?",
            "When do I get it?",
            "And the delivery time?",
            "How fast is delivery?",
        ),
        later_held_out=("How long does it take to deliver it?", "And what is the delivery time?"),
        later_answers=("Delivery takes {v} days.",),
    ),
    "shelf": Kind(
        train=(
            "Where is the {s}?",
            "On which shelf is the {s}?",
            "Where can I find the {s}?",
            "Which shelf has the {s}?",
            "Tell me where the {s} is.",
            "Shelf of the {s}?",
            "In what place of the shop is the {s}?",
            "I am in the shop and look for the {s}. Where is it?",
            "I need to know the shelf of your {s}.",
            "On what shelf do you keep the {s}?",
            "Do you know where to find the {s}?",
            "Where in the shop do you keep the {s}?",
        ),
        held_out=(
            "On which shelf can I find the {s}?",
            "Where do you keep the {s}?",
            "Can you tell me where to find the {s}?",
            "I would like to know on which shelf the {s} is.",
        ),
        answers=("The {s} is on shelf {v}.", "You find the {s} on shelf {v}."),
        later=("And where is it?", "On which shelf is it?", "And the shelf?", "Where can I find it?"),
        later_held_out=("Where do you keep it?", "And on which shelf?"),
        later_answers=("It is on shelf {v}.",),
    ),
}

ORDER_KINDS: dict[str, Kind] = {
    "status": Kind(
        train=(
            "What is the status of order {s}?",
            "How far is my order {s}?",
            "Tell me the status of order {s}.",
            "Has order {s} been shipped?",
            "Status of order {s}?",
            "My order is number {s}. What is its status?",
            "What is going on with order {s}?",
            "I need the status of order {s}.",
            "Do you know the status of my order {s}?",
            "Do you know how far order {s} is?",
        ),
        held_out=(
            "What is the status of my order {s}?",
            "Can you tell me the status of order {s}?",
            "I would like to know how far order {s} is.",
        ),
        answers=("Order {s} is {v}.", "The status of order {s} is {v}."),
    ),
    "day": Kind(
        train=(
            "When does order {s} arrive?",
            "On which day does my order {s} come?",
            "Tell me the day of order {s}.",
            "What day is order {s} planned for?",
            "Day of order {s}?",
            "My order is number {s}. On which day does it arrive?",
            "When will I get order {s}?",
            "I need to know the day of order {s}.",
            "Will my order {s} arrive soon? On which day?",
            "Do you know when order {s} comes?",
        ),
        held_out=(
            "On which day does order {s} arrive?",
            "When will my order {s} arrive?",
            "I would like to know when order {s} comes.",
        ),
        answers=("The day of order {s} is {v}.", "Order {s} is planned for {v}."),
    ),
    "item": Kind(
        train=(
            "What is in order {s}?",
            "Which product is order {s}?",
            "Tell me what I bought with order {s}.",
            "What did I order with number {s}?",
            "Content of order {s}?",
            "My order is number {s}. What did I buy?",
            "I forgot what is in order {s}.",
            "Which thing is in my order {s}?",
            "Do you know what is in order {s}?",
            "Which product did I buy with order {s}?",
        ),
        held_out=(
            "What did I buy with order {s}?",
            "Which product is in order {s}?",
            "Can you tell me what is in order {s}?",
        ),
        answers=("Order {s} is a {v}.", "In order {s} there is a {v}."),
    ),
    "hours": Kind(
        train=(
            "When are you open on {s}?",
            "What are your opening hours on {s}?",
            "From when to when are you open on {s}?",
            "Are you open on {s}?",
            "Opening hours on {s}?",
            "Tell me your hours for {s}.",
            "When can I come on {s}?",
            "I need to know the opening hours for {s}.",
            "Do you know when you are open on {s}?",
            "From when is the shop open on {s}?",
        ),
        held_out=(
            "When is the shop open on {s}?",
            "Can you tell me your opening hours on {s}?",
            "I would like to know when you are open on {s}.",
        ),
        answers=("On {s} we are open from {v}.", "We are open on {s} from {v}."),
        none=("On {s} we are closed.", "We are closed on {s}."),
    ),
}
"""Kinds whose subject is an order's number, or a day."""

SHOP_KINDS: dict[str, Kind] = {
    "name": Kind(
        train=("What is the name of the shop?", "What is this shop called?", "Tell me the name of your shop."),
        held_out=("What is the shop called?", "What is the name of your shop?"),
        answers=("The shop is called {v}.", "The name of the shop is {v}."),
    ),
    "street": Kind(
        train=(
            "What is your address?",
            "Where is the shop?",
            "In which street are you?",
            "Which street is the shop in?",
        ),
        held_out=("What is the address of the shop?", "In which street is the shop?"),
        answers=("The shop is at {v}.", "Our address is {v}."),
    ),
    "town": Kind(
        train=(
            "In which town are you?",
            "Which town is the shop in?",
            "Tell me the town of your shop.",
            "What town are you in?",
        ),
        held_out=("In which town is the shop?", "What town is your shop in?"),
        answers=("The shop is in {v}.", "We are in the town of {v}."),
    ),
    "phone": Kind(
        train=(
            "What is your phone number?",
            "How can I call you?",
            "Tell me the number of your phone.",
            "Can I call the shop?",
        ),
        held_out=("What is the phone number of the shop?", "Can you tell me your phone number?"),
        answers=("Our phone number is {v}.", "You can call us at {v}."),
    ),
    "owner": Kind(
        train=("Who owns the shop?", "Who is the owner?", "Whose shop is this?", "Tell me the name of the owner."),
        held_out=("Who is the owner of the shop?", "Can you tell me who owns the shop?"),
        answers=("The owner is {v}.", "{v} owns the shop."),
    ),
    "returns": Kind(
        train=(
            "Can I send things back?",
            "How long can I return a product?",
            "Can I return what I bought?",
            "How many days do I have to return something?",
        ),
        held_out=("How long can I return what I bought?", "Can I return a product?"),
        answers=("You can return products for {v}.", "Returns are possible for {v}."),
    ),
    "wrapping": Kind(
        train=(
            "Do you wrap gifts?",
            "What does gift wrapping cost?",
            "Can you wrap it as a gift?",
            "Is gift wrapping free?",
        ),
        held_out=("How much is gift wrapping?", "Can you wrap a gift for me?"),
        answers=("Gift wrapping costs {v}.", "We wrap gifts for {v}."),
    ),
    "parking": Kind(
        train=("Where can I park?", "Do you have parking?", "Is there a place for my car?", "Where do I park my car?"),
        held_out=("Where can I park my car?", "Is there parking at the shop?"),
        answers=("You can park {v}.", "Parking is {v}."),
    ),
    "payment": Kind(
        train=(
            "How can I pay?",
            "Do you take cards?",
            "Can I pay with cash?",
            "Which payment do you take?",
            "How do people pay in the shop?",
        ),
        held_out=("How can I pay in the shop?", "Can I pay with a card?"),
        answers=("You can pay by {v}.", "We take {v}."),
    ),
    "postage": Kind(
        train=(
            "What does postage cost?",
            "How much is postage?",
            "What do you ask for postage?",
            "Tell me the cost of postage.",
        ),
        held_out=("How much does postage cost?", "What is the cost of postage?"),
        answers=("Postage costs {v}.", "The postage is {v}."),
    ),
    "free postage": Kind(
        train=(
            "When is postage free?",
            "From how much is postage free?",
            "Is there free postage?",
            "How much must I spend for free postage?",
        ),
        held_out=("When do I get free postage?", "From what sum is postage free?"),
        answers=("Postage is free from {v}.", "From {v} on, postage is free."),
    ),
    "founded": Kind(
        train=(
            "How old is the shop?",
            "Since when is there this shop?",
            "When did the shop start?",
            "In which year did you start?",
        ),
        held_out=("In which year did the shop start?", "Since when do you have this shop?"),
        answers=("The shop was founded in {v}.", "We started in {v}."),
    ),
    "dogs": Kind(
        train=("Can I bring my dog?", "Are dogs allowed?", "May my dog come in?", "What about dogs in the shop?"),
        held_out=("Can my dog come in?", "Are dogs allowed in the shop?"),
        answers=("Dogs are {v} in the shop.", "Yes, dogs are {v}."),
    ),
    "repairs": Kind(
        train=(
            "Do you repair things?",
            "When do you do repairs?",
            "On which day are repairs?",
            "Can you repair my old bag?",
        ),
        held_out=("On which day do you do repairs?", "When can you repair things?"),
        answers=("We do repairs on {v}.", "Repairs are on {v}."),
    ),
    "guarantee": Kind(
        train=(
            "Is there a guarantee?",
            "How long is the guarantee?",
            "Do your products have a guarantee?",
            "How many years of guarantee do you give?",
        ),
        held_out=("How long is the guarantee on your products?", "Do you give a guarantee?"),
        answers=("The guarantee is {v}.", "We give a guarantee of {v}."),
    ),
    "sale": Kind(
        train=(
            "When is the next sale?",
            "Do you have a sale?",
            "In which month is the sale?",
            "When do prices go down?",
        ),
        held_out=("When is the sale?", "In which month do you have a sale?"),
        answers=("The sale is in {v}.", "Our sale is in {v}."),
    ),
}
