//! What stands in `#[mobula::actor(..)]`.

use proc_macro2::TokenStream;
use syn::meta::ParseNestedMeta;
use syn::parse::Parser;
use syn::spanned::Spanned;
use syn::{Error, Ident, LitInt, LitStr, Result, Token};

use crate::method::Method;

/// The largest number of methods that may run at once: each is a task with its own state.
const CONCURRENCY_MAX: u32 = 65_536;

/// Groups that one actor may have; choosing one looks at each.
const GROUPS_MAX: usize = 64;

/// The attribute's arguments.
#[derive(Default)]
pub(crate) struct Options {
    /// The type's name.
    pub(crate) name: Option<LitStr>,
    /// The limit of the methods that name no group.
    max_concurrency: Option<u32>,
    groups: Vec<(Ident, u32)>,
    /// Whether it keeps state.
    pub(crate) durable: bool,
}

impl Options {
    pub(crate) fn read(arguments: TokenStream) -> Result<Self> {
        let mut options = Options::default();
        let span = arguments.span();
        syn::meta::parser(|meta| options.read_one(&meta)).parse2(arguments)?;
        if options.durable && options.is_concurrent() {
            return Err(Error::new(
                span,
                "a durable actor runs one method at a time: what each changed is committed as one",
            ));
        }
        Ok(options)
    }

    fn read_one(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        if meta.path.is_ident("name") {
            let text: LitStr = meta.value()?.parse()?;
            if text.value().is_empty() || text.value().len() > 128 {
                return Err(Error::new(text.span(), "a type's name has 1 to 128 bytes"));
            }
            self.name = Some(text);
            return Ok(());
        }
        if meta.path.is_ident("max_concurrency") {
            self.max_concurrency = Some(read_limit(&meta.value()?.parse()?)?);
            return Ok(());
        }
        if meta.path.is_ident("durable") {
            self.durable = true;
            return Ok(());
        }
        if meta.path.is_ident("groups") {
            return meta.parse_nested_meta(|group| self.read_group(&group));
        }
        Err(meta.error(
            "unknown: use `name = \"..\"`, `durable`, `max_concurrency = 8` or `groups(io = 4)`",
        ))
    }

    fn read_group(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let name = meta.path.require_ident()?.clone();
        meta.input.parse::<Token![=]>()?;
        let limit = read_limit(&meta.input.parse()?)?;
        if self.groups.iter().any(|(known, _)| *known == name) {
            return Err(meta.error("this group is there already"));
        }
        if self.groups.len() + 1 >= GROUPS_MAX {
            return Err(meta.error(format!("an actor has {GROUPS_MAX} groups at most")));
        }
        self.groups.push((name, limit));
        Ok(())
    }

    /// Whether several methods may run at once.
    pub(crate) fn is_concurrent(&self) -> bool {
        self.max_concurrency.unwrap_or(1) > 1 || !self.groups.is_empty()
    }

    /// The limit of each group; the first is that of methods that name none.
    pub(crate) fn limits(&self) -> Vec<u32> {
        let first = self.max_concurrency.unwrap_or(1);
        let others = self.groups.iter().map(|(_, limit)| *limit);
        std::iter::once(first).chain(others).collect()
    }

    /// Which group `method` is in.
    pub(crate) fn group_of(&self, method: &Method) -> Result<usize> {
        let Some(name) = &method.group else {
            return Ok(0);
        };
        let known = self
            .groups
            .iter()
            .position(|(known, _)| known == name.value().as_str());
        known.map(|index| index + 1).ok_or_else(|| {
            let text = name.value();
            Error::new(
                name.span(),
                format!("declare this group: #[mobula::actor(groups({text} = 4))]"),
            )
        })
    }
}

fn read_limit(number: &LitInt) -> Result<u32> {
    let limit = number.base10_parse::<u32>()?;
    if (1..=CONCURRENCY_MAX).contains(&limit) {
        return Ok(limit);
    }
    Err(Error::new(
        number.span(),
        format!("a limit is a number from 1 to {CONCURRENCY_MAX}"),
    ))
}
