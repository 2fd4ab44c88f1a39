"""The certificates of a channel, as summaries name them and in words."""

BOUNDS = {
    "first_order_bound": "first-order bound",
    "second_order_bound": "second-order bound",
    "second_order_plus_remainder_bound": "bound of second order plus remainder",
}
