//! What one function of an actor's `impl` block is, and whether it may be that.

use proc_macro2::{Ident, Span, TokenStream, TokenTree};
use quote::ToTokens;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned;
use syn::{
    Attribute, Error, FnArg, GenericArgument, ImplItemFn, LitStr, Pat, PatType, PathArguments,
    Result, ReturnType, Type, TypeParamBound,
};

/// Names that an `ActorRef` has already: a call would not reach the actor.
const RESERVED: [&str; 10] = [
    "actor_id",
    "stop_actor",
    "kill_actor",
    "clone",
    "clone_from",
    "into",
    "try_into",
    "to_owned",
    "type_id",
    "construct",
];

/// What a function of the block is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The constructor.
    Constructor,
    /// Callable from other processes.
    Call,
    /// Runs before the first call.
    Started,
    /// Runs when the node is given notice.
    Notice,
    /// Runs when the actor is stopped.
    Stop,
    /// None of our business.
    Local,
}

/// What a function gives back.
pub(crate) enum Output {
    /// A plain value.
    Value(TokenStream),
    /// A value or the user's error.
    Fallible(TokenStream, TokenStream),
    /// Values of this type, one after another.
    Items(TokenStream),
}

/// One function, understood.
pub(crate) struct Method {
    pub(crate) purpose: Purpose,
    pub(crate) name: Ident,
    pub(crate) docs: Vec<Attribute>,
    pub(crate) is_async: bool,
    /// Whether it takes `&mut self`.
    pub(crate) is_exclusive: bool,
    pub(crate) takes_context: bool,
    /// The concurrency group that it names.
    pub(crate) group: Option<LitStr>,
    /// Whether it blocks its thread, and says so.
    pub(crate) blocks: bool,
    pub(crate) arguments: Vec<(Ident, TokenStream)>,
    pub(crate) output: Output,
}

impl Method {
    /// Reads `function`, and takes our own attributes off it. `actor` stands for `Self`.
    pub(crate) fn read(function: &mut ImplItemFn, actor: &Type) -> Result<Self> {
        let Marks {
            purpose: marked,
            group,
            blocking,
        } = take_marks(function)?;
        let signature = &function.sig;
        let name = signature.ident.clone();
        let purpose = match (marked, signature.receiver()) {
            (Some((purpose, span)), None) if purpose != Purpose::Local => {
                return Err(Error::new(span, "a hook needs `&self` or `&mut self`"));
            }
            (Some((purpose, _)), _) => purpose,
            (None, Some(_)) => Purpose::Call,
            (None, None) if name == "new" => Purpose::Constructor,
            (None, None) => Purpose::Local,
        };
        let docs = function
            .attrs
            .iter()
            .filter(|a| a.path().is_ident("doc"))
            .cloned()
            .collect();
        let mut method = Method {
            purpose,
            name,
            docs,
            is_async: signature.asyncness.is_some(),
            is_exclusive: signature
                .receiver()
                .is_some_and(|receiver| receiver.mutability.is_some()),
            takes_context: false,
            group,
            blocks: blocking.is_some(),
            arguments: Vec::new(),
            output: Output::Value(quote::quote!(())),
        };
        method.check_marks(blocking)?;
        if purpose == Purpose::Local {
            return Ok(method);
        }
        method.check_shape(function)?;
        method.read_arguments(function, actor)?;
        method.output = read_output(&function.sig.output, purpose, actor)?;
        method.check_hook(function)?;
        Ok(method)
    }

    fn check_marks(&self, blocking: Option<Span>) -> Result<()> {
        let called = self.purpose == Purpose::Call;
        if let Some(group) = &self.group
            && (self.is_exclusive || !called)
        {
            return Err(Error::new(
                group.span(),
                "only a method with `&self` runs beside others and can be in a group: one with \
                 `&mut self` runs alone",
            ));
        }
        match blocking {
            Some(span) if self.is_async => Err(Error::new(
                span,
                "`blocking` stands on a plain `fn`: in an `async fn`, put what blocks into \
                 `mobula::run_blocking(|| ..)`",
            )),
            Some(span) if !called => Err(Error::new(span, "`blocking` is for methods")),
            _ => Ok(()),
        }
    }

    fn check_shape(&self, function: &ImplItemFn) -> Result<()> {
        let signature = &function.sig;
        if let Some(receiver) = signature.receiver()
            && (receiver.reference.is_none() || receiver.colon_token.is_some())
        {
            return Err(Error::new(
                receiver.span(),
                "an actor lives on between calls: take `&self` or `&mut self` (or mark the \
                 function #[mobula(local)])",
            ));
        }
        if !signature.generics.params.is_empty() || signature.generics.where_clause.is_some() {
            return Err(Error::new(
                signature.generics.span(),
                "a function that is called across processes cannot be generic: give its types, or \
                 mark it #[mobula(local)]",
            ));
        }
        if let Some(unsafety) = signature.unsafety {
            return Err(Error::new(
                unsafety.span(),
                "an actor's functions cannot be `unsafe`",
            ));
        }
        if self.purpose == Purpose::Call
            && let Some(reserved) = RESERVED.iter().find(|reserved| self.name == *reserved)
        {
            return Err(Error::new(
                self.name.span(),
                format!("an ActorRef has a `{reserved}` of its own: choose another name"),
            ));
        }
        Ok(())
    }

    fn read_arguments(&mut self, function: &ImplItemFn, actor: &Type) -> Result<()> {
        for (position, argument) in function.sig.inputs.iter().enumerate() {
            let FnArg::Typed(argument) = argument else {
                continue;
            };
            let first = position == usize::from(function.sig.receiver().is_some());
            if first && is_context(&argument.ty) {
                self.takes_context = true;
                continue;
            }
            let name = sent_argument(argument)?;
            let argument_type = replace_self(argument.ty.to_token_stream(), actor);
            self.arguments.push((name, argument_type));
        }
        Ok(())
    }

    fn check_hook(&self, function: &ImplItemFn) -> Result<()> {
        let wanted = match self.purpose {
            Purpose::Started | Purpose::Stop => 0,
            Purpose::Notice => 1,
            _ => return Ok(()),
        };
        let plain = matches!(&function.sig.output, ReturnType::Default);
        if self.arguments.len() == wanted && plain {
            return Ok(());
        }
        Err(Error::new(
            function.sig.span(),
            match self.purpose {
                Purpose::Notice => "write this hook as `async fn f(&mut self, deadline_ms: u64)`",
                _ => "write this hook as `async fn f(&mut self)`",
            },
        ))
    }
}

/// What `#[mobula(..)]` says about a function.
#[derive(Default)]
struct Marks {
    purpose: Option<(Purpose, Span)>,
    group: Option<LitStr>,
    blocking: Option<Span>,
}

fn take_marks(function: &mut ImplItemFn) -> Result<Marks> {
    let mut marks = Marks::default();
    let mut kept = Vec::new();
    let mut seen = false;
    for attribute in std::mem::take(&mut function.attrs) {
        if !attribute.path().is_ident("mobula") {
            kept.push(attribute);
            continue;
        }
        if std::mem::replace(&mut seen, true) {
            return Err(Error::new(
                attribute.span(),
                "a function has one #[mobula(..)] at most",
            ));
        }
        attribute.parse_nested_meta(|meta| read_mark(&meta, &mut marks))?;
    }
    function.attrs = kept;
    Ok(marks)
}

fn read_mark(meta: &ParseNestedMeta<'_>, marks: &mut Marks) -> Result<()> {
    let word = meta.path.require_ident()?;
    let purpose = match word.to_string().as_str() {
        "group" => {
            marks.group = Some(meta.value()?.parse()?);
            return Ok(());
        }
        "blocking" => {
            marks.blocking = Some(word.span());
            return Ok(());
        }
        "local" => Purpose::Local,
        "started" => Purpose::Started,
        "notice" => Purpose::Notice,
        "stop" => Purpose::Stop,
        other => {
            return Err(Error::new(
                word.span(),
                format!(
                    "`{other}` is unknown: use local, started, notice, stop, blocking or \
                     group = \"..\""
                ),
            ));
        }
    };
    if marks.purpose.replace((purpose, word.span())).is_some() {
        return Err(Error::new(
            word.span(),
            "a function is for one purpose only",
        ));
    }
    Ok(())
}

pub(crate) fn read_output(output: &ReturnType, purpose: Purpose, actor: &Type) -> Result<Output> {
    let ReturnType::Type(_, returned) = output else {
        return Ok(Output::Value(quote::quote!(())));
    };
    let tokens = |part: &Type| replace_self(part.to_token_stream(), actor);
    if purpose == Purpose::Call
        && let Some(item) = stream_item(returned)
    {
        check_owned(item, "a returned value")?;
        return Ok(Output::Items(tokens(item)));
    }
    check_owned(returned, "a returned value")?;
    let Some(parts) = result_parts(returned) else {
        return Ok(Output::Value(tokens(returned)));
    };
    match (parts.as_slice(), purpose) {
        ([value, error], _) => Ok(Output::Fallible(tokens(value), tokens(error))),
        // The constructor's error travels as text, so its type need not be known.
        (_, Purpose::Constructor) => Ok(Output::Fallible(quote::quote!(Self), quote::quote!(()))),
        _ => Err(Error::new(
            returned.span(),
            "the caller gets the error as the type it is: write `Result<T, E>` with both types",
        )),
    }
}

/// The `T` of `impl Stream<Item = T>` and of `StreamOf<T>`.
fn stream_item(returned: &Type) -> Option<&Type> {
    match returned {
        Type::ImplTrait(implemented) => implemented.bounds.iter().find_map(|bound| {
            let TypeParamBound::Trait(bound) = bound else {
                return None;
            };
            let last = bound.path.segments.last()?;
            let PathArguments::AngleBracketed(arguments) = &last.arguments else {
                return None;
            };
            arguments.args.iter().find_map(|argument| match argument {
                GenericArgument::AssocType(item) if last.ident == "Stream" => Some(&item.ty),
                _ => None,
            })
        }),
        Type::Path(path) => {
            let last = path.path.segments.last()?;
            let PathArguments::AngleBracketed(arguments) = &last.arguments else {
                return None;
            };
            match arguments.args.first()? {
                GenericArgument::Type(item) if last.ident == "StreamOf" => Some(item),
                _ => None,
            }
        }
        _ => None,
    }
}

/// The type arguments of a `Result<..>`.
fn result_parts(returned: &Type) -> Option<Vec<&Type>> {
    let Type::Path(path) = returned else {
        return None;
    };
    let last = path.path.segments.last()?;
    if last.ident != "Result" {
        return None;
    }
    let PathArguments::AngleBracketed(arguments) = &last.arguments else {
        return Some(vec![]);
    };
    let types = arguments.args.iter().filter_map(|argument| match argument {
        GenericArgument::Type(part) => Some(part),
        _ => None,
    });
    Some(types.collect())
}

fn is_context(argument: &Type) -> bool {
    let Type::Reference(reference) = argument else {
        return false;
    };
    reference.mutability.is_none() && names_type(&reference.elem, "ActorContext")
}

/// Whether a type is written as a path that ends in `name`.
pub(crate) fn names_type(part: &Type, name: &str) -> bool {
    let Type::Path(path) = part else {
        return false;
    };
    path.path
        .segments
        .last()
        .is_some_and(|last| last.ident == name)
}

/// The name of an argument that is sent with a call, which must have one and be owned.
pub(crate) fn sent_argument(argument: &PatType) -> Result<Ident> {
    let Pat::Ident(pattern) = &*argument.pat else {
        return Err(Error::new(
            argument.pat.span(),
            "give this argument a name, and take it apart in the body",
        ));
    };
    check_owned(&argument.ty, "an argument")?;
    Ok(pattern.ident.clone())
}

/// Refuses references and `impl Trait`, wherever in the type they stand.
pub(crate) fn check_owned(part: &Type, what: &str) -> Result<()> {
    fn find(tokens: TokenStream, what: &str) -> Result<()> {
        for token in tokens {
            match token {
                TokenTree::Punct(punct) if punct.as_char() == '&' => {
                    return Err(Error::new(
                        punct.span(),
                        format!(
                            "{what} travels between processes and cannot be borrowed: use an owned \
                             type (`String` for `&str`, `Vec<T>` for `&[T]`)"
                        ),
                    ));
                }
                TokenTree::Ident(word) if word == "impl" || word == "dyn" => {
                    return Err(Error::new(
                        word.span(),
                        format!("{what} travels between processes: give its concrete type"),
                    ));
                }
                TokenTree::Group(group) => find(group.stream(), what)?,
                _ => {}
            }
        }
        Ok(())
    }
    find(part.to_token_stream(), what)
}

/// `Self` means the actor, also where the tokens end up in another `impl` block.
fn replace_self(tokens: TokenStream, actor: &Type) -> TokenStream {
    tokens
        .into_iter()
        .flat_map(|token| match token {
            TokenTree::Ident(word) if word == "Self" => actor.to_token_stream(),
            TokenTree::Group(group) => {
                let inner = replace_self(group.stream(), actor);
                let mut replaced = proc_macro2::Group::new(group.delimiter(), inner);
                replaced.set_span(group.span());
                TokenTree::Group(replaced).into_token_stream()
            }
            other => other.into_token_stream(),
        })
        .collect()
}
