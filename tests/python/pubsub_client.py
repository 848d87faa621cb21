"""Checks a Pub/Sub emulator with Google's Python client.

Creates a topic and a subscription, publishes ten messages, streaming-pulls and
acknowledges all of them, and finds nothing left with a unary pull.

Needs google-cloud-pubsub and, in PUBSUB_EMULATOR_HOST, the emulator's
host:port. Exits 0, or prints what failed and exits 1.
"""

import os
import sys
import threading
import uuid

from google.cloud import pubsub_v1

COUNT = 10
# Only against hanging.
PATIENCE = 60


def check(condition, what):
    if not condition:
        sys.exit(f"failed: {what}")


def main():
    check(os.environ.get("PUBSUB_EMULATOR_HOST"), "PUBSUB_EMULATOR_HOST is not set")
    publisher = pubsub_v1.PublisherClient()
    subscriber = pubsub_v1.SubscriberClient()
    run = uuid.uuid4().hex
    topic = publisher.topic_path("python-check", f"topic-{run}")
    subscription = subscriber.subscription_path("python-check", f"subscription-{run}")

    publisher.create_topic(name=topic)
    subscriber.create_subscription(name=subscription, topic=topic)
    sent = {}
    for number in range(COUNT):
        future = publisher.publish(topic, f"message {number}".encode(), number=str(number))
        sent[future.result(timeout=PATIENCE)] = number
    check(len(sent) == COUNT, f"{COUNT} message ids, got {len(sent)}")

    received = streaming_pull(subscriber, subscription)
    check(set(received) == set(sent), f"sent {sorted(sent)}, received {sorted(received)}")
    for message_id, (data, attributes) in received.items():
        number = sent[message_id]
        check(data == f"message {number}".encode(), f"data of {message_id}: {data!r}")
        check(attributes == {"number": str(number)}, f"attributes of {message_id}: {attributes}")

    left = subscriber.pull(
        subscription=subscription, max_messages=COUNT, return_immediately=True, timeout=PATIENCE
    )
    check(not left.received_messages, f"nothing left, got {left.received_messages}")

    subscriber.delete_subscription(subscription=subscription)
    publisher.delete_topic(topic=topic)


def streaming_pull(subscriber, subscription):
    """What arrives until COUNT different messages were acknowledged."""
    received = {}
    complete = threading.Event()

    def on_message(message):
        received[message.message_id] = (message.data, dict(message.attributes))
        message.ack()
        if len(received) == COUNT:
            complete.set()

    pull = subscriber.subscribe(subscription, callback=on_message, await_callbacks_on_shutdown=True)
    arrived = complete.wait(timeout=PATIENCE)
    # Sends the acks that are still queued.
    pull.cancel()
    pull.result(timeout=PATIENCE)
    check(arrived, f"{COUNT} messages within {PATIENCE} s, got {len(received)}")
    return received


if __name__ == "__main__":
    main()
    print("Google's Python client publishes into the emulator and pulls from it")
