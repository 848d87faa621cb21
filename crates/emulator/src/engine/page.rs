//! Paging through lists.

use crate::error::BrokerError;

const DEFAULT_PAGE: usize = 100;
const LARGEST_PAGE: usize = 1000;

/// Which part of a list to return.
#[derive(Debug, Clone, Default)]
pub struct PageRequest {
    /// Zero or less asks for the default.
    pub size: i32,
    /// Empty for the first page, otherwise the token of the previous page.
    pub token: String,
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Empty on the last page.
    pub next_token: String,
}

impl PageRequest {
    /// Returns a page of things sorted by name; only names with the prefix count. A token
    /// is the last name of the previous page, so paging stays correct when things come
    /// and go.
    pub(super) fn cut<'a, T: 'a, U>(
        &self,
        all: impl Iterator<Item = (&'a String, &'a T)>,
        prefix: &str,
        show: impl Fn(&T) -> U,
    ) -> Result<Page<U>, BrokerError> {
        if !self.token.starts_with(prefix) && !self.token.is_empty() {
            return Err(BrokerError::InvalidArgument(
                "The page token is not of this list.".to_owned(),
            ));
        }
        let size = match usize::try_from(self.size) {
            Ok(0) | Err(_) => DEFAULT_PAGE,
            Ok(size) => size.min(LARGEST_PAGE),
        };
        let mut rest = all
            .filter(|(name, _)| name.starts_with(prefix) && **name > self.token)
            .peekable();
        let mut last = "";
        let mut items = Vec::new();
        while let Some((name, item)) = rest.next_if(|_| items.len() < size) {
            last = name;
            items.push(show(item));
        }
        let next_token = match rest.peek() {
            Some(_) => last.to_owned(),
            None => String::new(),
        };
        Ok(Page { items, next_token })
    }
}
