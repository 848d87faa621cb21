//! Micro-batches: requests that arrive while one statement runs form the next batch. An
//! idle guard sends at once.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use crate::store::{StoreError, in_time};

/// Larger batches gain nothing more and delay everybody in them.
const MAX_BATCH: usize = 200;
const MAX_BATCH_BYTES: usize = 8 << 20;

type Answer<A> = Result<A, Arc<StoreError>>;
type Ask<Q, A> = (Q, oneshot::Sender<Answer<A>>);
type Run<Q, A> = dyn Fn(Vec<Q>) -> BoxFuture<'static, Result<Vec<A>, StoreError>> + Send + Sync;

/// Collects questions into statements.
pub(super) struct Batcher<Q, A> {
    asks: mpsc::Sender<Ask<Q, A>>,
}

impl<Q, A> Clone for Batcher<Q, A> {
    fn clone(&self) -> Self {
        Self {
            asks: self.asks.clone(),
        }
    }
}

impl<Q: Clone + Send + 'static, A: Send + 'static> Batcher<Q, A> {
    /// `run` answers a batch in its order; `bytes` returns the size of a question. The
    /// loop that is returned, too, must run; it ends with the last clone.
    pub(super) fn new(
        bytes: fn(&Q) -> usize,
        run: impl Fn(Vec<Q>) -> BoxFuture<'static, Result<Vec<A>, StoreError>> + Send + Sync + 'static,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (asks, mut asked) = mpsc::channel::<Ask<Q, A>>(MAX_BATCH);
        let answering = async move {
            while let Some(first) = asked.recv().await {
                let mut size = bytes(&first.0);
                let mut batch = vec![first];
                while batch.len() < MAX_BATCH
                    && size < MAX_BATCH_BYTES
                    && let Ok(next) = asked.try_recv()
                {
                    size += bytes(&next.0);
                    batch.push(next);
                }
                answer(&run, batch).await;
            }
        };
        (Self { asks }, answering)
    }

    /// Asks, alone or in a batch with others.
    ///
    /// # Errors
    /// The batch's error, shared by all in it.
    pub(super) async fn ask(&self, question: Q) -> Answer<A> {
        let (reply, answer) = oneshot::channel();
        let lost = || Arc::new(StoreError::NoAnswer(Duration::ZERO));
        self.asks
            .send((question, reply))
            .await
            .map_err(|_| lost())?;
        answer.await.map_err(|_| lost())?
    }
}

async fn answer<Q: Clone, A>(run: &Run<Q, A>, batch: Vec<Ask<Q, A>>) {
    let questions: Vec<Q> = batch.iter().map(|(question, _)| question.clone()).collect();
    match in_time(run(questions)).await {
        Ok(answers) => {
            for ((_, reply), answer) in batch.into_iter().zip(answers) {
                // An error means that the asker has gone.
                let _ = reply.send(Ok(answer));
            }
        }
        // One bad question must not fail the others.
        Err(StoreError::Refused(_)) if batch.len() > 1 => {
            for (question, reply) in batch {
                let alone = in_time(run(vec![question])).await;
                let alone = alone.map_err(Arc::new).and_then(only);
                let _ = reply.send(alone);
            }
        }
        Err(error) => {
            let error = Arc::new(error);
            for (_, reply) in batch {
                let _ = reply.send(Err(Arc::clone(&error)));
            }
        }
    }
}

fn only<A>(answers: Vec<A>) -> Answer<A> {
    let answer = answers.into_iter().next();
    answer.ok_or_else(|| Arc::new(StoreError::Unreadable("no row answers".to_owned())))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    /// Doubles numbers, one batch per permit, and records each batch's size.
    struct Doubling {
        batcher: Batcher<u32, u32>,
        gate: Arc<Semaphore>,
        sizes: Arc<Mutex<Vec<usize>>>,
    }

    fn doubling() -> Doubling {
        let gate = Arc::new(Semaphore::new(0));
        let sizes: Arc<Mutex<Vec<usize>>> = Arc::default();
        let inside = (Arc::clone(&gate), Arc::clone(&sizes));
        let (batcher, answering) = Batcher::new(
            |_| 0,
            move |numbers: Vec<u32>| {
                let (gate, sizes) = inside.clone();
                Box::pin(async move {
                    gate.acquire().await.unwrap().forget();
                    sizes.lock().unwrap().push(numbers.len());
                    if numbers.contains(&13) {
                        return Err(StoreError::Refused(sqlx_error()));
                    }
                    Ok(numbers.into_iter().map(|number| number * 2).collect())
                })
            },
        );
        tokio::spawn(answering);
        Doubling {
            batcher,
            gate,
            sizes,
        }
    }

    fn sqlx_error() -> crate::store::DatabaseError {
        crate::store::DatabaseError::RowNotFound
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_asked_meanwhile_becomes_one_batch() {
        let Doubling {
            batcher,
            gate,
            sizes,
        } = doubling();
        let alone = tokio::spawn({
            let batcher = batcher.clone();
            async move { batcher.ask(0).await }
        });
        let settled = || tokio::time::sleep(Duration::from_millis(1));
        settled().await;
        let meanwhile =
            tokio::spawn(
                async move { join_all((100..149).map(|number| batcher.ask(number))).await },
            );
        settled().await;
        gate.add_permits(2);
        assert_eq!(alone.await.unwrap().unwrap(), 0);
        for (number, answer) in (100..149).zip(meanwhile.await.unwrap()) {
            assert_eq!(answer.unwrap(), number * 2);
        }
        assert_eq!(*sizes.lock().unwrap(), [1, 49]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_question_fails_alone() {
        let Doubling { batcher, gate, .. } = doubling();
        gate.add_permits(100);
        let answers = join_all((10..16).map(|number| batcher.ask(number))).await;
        let failed: Vec<bool> = answers.iter().map(Result::is_err).collect();
        assert_eq!(failed, [false, false, false, true, false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_database_that_never_answers_is_an_error() {
        let Doubling {
            batcher,
            gate: _closed,
            ..
        } = doubling();
        let answer = batcher.ask(1).await;
        assert!(matches!(&*answer.unwrap_err(), StoreError::NoAnswer(_)));
    }
}
