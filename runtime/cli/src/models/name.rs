//! How a version is named on a command line: `digits`, `digits:3`, `digits:champion`.

use std::str::FromStr;

use mobula_actors::registry::search::Selector;

/// A model, and which version of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VersionName {
    pub(crate) model: String,
    pub(crate) selector: Selector,
}

impl FromStr for VersionName {
    type Err = String;

    /// `@` is read as `:`, as others write it.
    fn from_str(text: &str) -> Result<Self, String> {
        let (model, version) = match text.split_once([':', '@']) {
            None => (text, None),
            Some((model, version)) => (model, Some(version)),
        };
        if model.is_empty() || version.is_some_and(str::is_empty) {
            return Err("write `name`, `name:3` or `name:alias`".to_owned());
        }
        let selector = match version {
            None => Selector::Newest,
            Some(version) => match version.parse() {
                Ok(number) => Selector::Number(number),
                Err(_) => Selector::Alias(version.to_owned()),
            },
        };
        Ok(VersionName {
            model: model.to_owned(),
            selector,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_named_by_number_by_alias_or_not_at_all() {
        for (text, selector) in [
            ("digits", Selector::Newest),
            ("digits:3", Selector::Number(3)),
            ("digits@3", Selector::Number(3)),
            ("digits:champion", Selector::Alias("champion".to_owned())),
        ] {
            let name: VersionName = text.parse().unwrap();
            assert_eq!((name.model.as_str(), name.selector), ("digits", selector));
        }
        for text in ["", ":3", "digits:"] {
            assert!(text.parse::<VersionName>().is_err(), "{text}");
        }
    }
}
