"""A subscriber as many teams write it: insert the message id, do the work, ack.

It does no work, so that what is measured is all that goes on around it. The environment
names the subscription, the database (libpq's URL) and the number of threads; it runs until
it is killed.
"""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg2
from google.cloud import pubsub_v1
from google.cloud.pubsub_v1.subscriber.scheduler import ThreadScheduler

SUBSCRIPTION = os.environ["SUBSCRIPTION"]
DATABASE = os.environ["DATABASE"]
THREADS = int(os.environ["THREADS"])

local = threading.local()


def connection():
    if not hasattr(local, "connection"):
        local.connection = psycopg2.connect(DATABASE)
        local.connection.autocommit = True
    return local.connection


def handle(message):
    with connection().cursor() as cursor:
        cursor.execute(
            "INSERT INTO processed (message_id) VALUES (%s) ON CONFLICT DO NOTHING",
            (message.message_id,),
        )
        is_new = cursor.rowcount == 1
    if is_new:
        pass  # The work.
    message.ack()


def main():
    subscriber = pubsub_v1.SubscriberClient()
    future = subscriber.subscribe(
        SUBSCRIPTION,
        callback=handle,
        scheduler=ThreadScheduler(ThreadPoolExecutor(max_workers=THREADS)),
    )
    signal.signal(signal.SIGTERM, lambda *_: future.cancel())
    future.result()


main()
