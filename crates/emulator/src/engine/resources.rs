//! Creates, shows, lists and deletes topics and subscriptions.

use std::collections::{BTreeSet, VecDeque};

use super::{Engine, Page, PageRequest, Topic, Wake};
use crate::error::BrokerError;
use crate::feed::Feed;
use crate::name::{self, DELETED_TOPIC};
use crate::resource;

impl Engine {
    pub fn create_topic(&mut self, settings: resource::Topic) -> Result<(), BrokerError> {
        settings.check()?;
        if self.topics.contains_key(&settings.name) {
            return Err(BrokerError::already_exists(&settings.name));
        }
        let topic = Topic {
            settings: settings.clone(),
            subscriptions: BTreeSet::new(),
            history: VecDeque::new(),
        };
        self.note_dead_letter_topic(&settings.name, true);
        self.topics.insert(settings.name, topic);
        Ok(())
    }

    pub fn topic(&self, name: &str) -> Result<resource::Topic, BrokerError> {
        Ok(self.known_topic(name)?.settings.clone())
    }

    pub fn topics(
        &self,
        project: &str,
        page: &PageRequest,
    ) -> Result<Page<resource::Topic>, BrokerError> {
        name::check_project(project)?;
        page.cut(self.topics.iter(), &format!("{project}/"), |topic| {
            topic.settings.clone()
        })
    }

    /// The names of the subscriptions of a topic.
    pub fn topic_subscriptions(
        &self,
        topic: &str,
        page: &PageRequest,
    ) -> Result<Page<String>, BrokerError> {
        let names = &self.known_topic(topic)?.subscriptions;
        page.cut(names.iter().map(|name| (name, name)), "", String::clone)
    }

    /// Deletes a topic. Its subscriptions stay, with their messages.
    pub fn delete_topic(&mut self, name: &str) -> Result<(), BrokerError> {
        self.known_topic(name)?;
        let Some(topic) = self.topics.remove(name) else {
            return Ok(());
        };
        self.note_dead_letter_topic(name, false);
        for subscription in &topic.subscriptions {
            if let Some(feed) = self.feeds.get_mut(subscription) {
                feed.settings.topic = DELETED_TOPIC.to_owned();
            }
        }
        Ok(())
    }

    /// Returns the settings with the defaults filled in.
    pub fn create_subscription(
        &mut self,
        settings: resource::Subscription,
    ) -> Result<resource::Subscription, BrokerError> {
        let settings = settings.checked()?;
        if self.feeds.contains_key(&settings.name) {
            return Err(BrokerError::already_exists(&settings.name));
        }
        if let Some(policy) = &settings.dead_letter {
            self.known_topic(&policy.topic)?;
        }
        let creation = self.next_number();
        let topic = self
            .topics
            .get_mut(&settings.topic)
            .ok_or_else(|| BrokerError::not_found(&settings.topic))?;
        topic.subscriptions.insert(settings.name.clone());
        let feed = Feed::new(settings.clone(), creation);
        self.feeds.insert(settings.name.clone(), feed);
        Ok(settings)
    }

    pub fn subscription(&self, name: &str) -> Result<resource::Subscription, BrokerError> {
        name::check_subscription(name)?;
        let feed = self.feeds.get(name);
        let feed = feed.ok_or_else(|| BrokerError::not_found(name))?;
        Ok(feed.settings.clone())
    }

    pub fn subscriptions(
        &self,
        project: &str,
        page: &PageRequest,
    ) -> Result<Page<resource::Subscription>, BrokerError> {
        name::check_project(project)?;
        page.cut(self.feeds.iter(), &format!("{project}/"), |feed| {
            feed.settings.clone()
        })
    }

    pub fn delete_subscription(&mut self, name: &str) -> Result<(), BrokerError> {
        self.feed(name)?;
        let Some(feed) = self.feeds.remove(name) else {
            return Ok(());
        };
        if let Some(topic) = self.topics.get_mut(&feed.settings.topic) {
            topic.subscriptions.remove(name);
        }
        // Its streams notice that it is gone when they look.
        self.wakes.extend(feed.stream_ids().map(Wake::Stream));
        self.wakes.push(Wake::Pull(name.to_owned()));
        Ok(())
    }
}
