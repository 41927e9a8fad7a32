//! `#[mobula::task]`: from a function to a task, its registration and its description.

use proc_macro2::TokenStream;
use quote::{ToTokens, format_ident, quote};
use syn::meta::ParseNestedMeta;
use syn::parse::Parser;
use syn::spanned::Spanned;
use syn::{Error, FnArg, Ident, ItemFn, Lit, LitBool, LitInt, LitStr, Result, Type, parse2};

use crate::method::{Output, Purpose, names_type, read_output, sent_argument};

/// Reads the attribute and its function, and writes everything that makes a task.
pub(crate) fn expand(arguments: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let options = Options::read(arguments)?;
    let mut function: ItemFn = parse2(item).map_err(|error| {
        Error::new(
            error.span(),
            "#[mobula::task] stands on a function of its own, `async fn square(x: u64) -> u64`",
        )
    })?;
    check_shape(&function)?;
    let parameters = Parameters::read(&function)?;
    let unit: Type = syn::parse_quote!(());
    let output = read_output(&function.sig.output, Purpose::Call, &unit)?;
    let value = match &output {
        Output::Value(value) | Output::Fallible(value, _) => value.clone(),
        Output::Items(item) => quote!(::mobula::__private::Items<#item>),
    };

    let name = function.sig.ident.clone();
    let visibility = function.vis.clone();
    // Around the function itself, so that what they say about lints holds for both.
    let is_outer = |attribute: &syn::Attribute| {
        ["doc", "allow", "expect"]
            .iter()
            .any(|name| attribute.path().is_ident(name))
    };
    let (outer, attributes): (Vec<_>, Vec<_>) = std::mem::take(&mut function.attrs)
        .into_iter()
        .partition(is_outer);
    let inner = format_ident!("run_{name}", span = name.span());
    function.sig.ident = inner.clone();
    function.vis = syn::Visibility::Inherited;
    function.attrs = attributes;

    let execute = write_execution(&function, &inner, &name, &parameters, &output);
    let defaults = options.write(&name);
    let names: Vec<_> = parameters.values.iter().map(|(name, _)| name).collect();
    let types = parameters.values.iter().map(|(_, part)| part);
    let dependencies = parameters.dependencies();
    Ok(quote! {
        #(#outer)*
        #[doc = ""]
        #[doc = "This describes the task, for `cluster.task(..)`; it runs in a slot of a worker."]
        #visibility fn #name(#(#names: #types),*) -> ::mobula::Task<#value> {
            #function
            #execute
            #defaults
            ::mobula::__private::inventory::submit! {
                ::mobula::__private::TaskType { name: DEFAULTS.name, run: execute }
            }
            ::mobula::__private::task(&DEFAULTS, &(#(&#names,)*)) #dependencies
        }
    })
}

fn check_shape(function: &ItemFn) -> Result<()> {
    let signature = &function.sig;
    if let Some(receiver) = signature.receiver() {
        return Err(Error::new(
            receiver.span(),
            "a task is a function of its own: state belongs into an actor",
        ));
    }
    if !signature.generics.params.is_empty() || signature.generics.where_clause.is_some() {
        return Err(Error::new(
            signature.generics.span(),
            "a task cannot be generic: a slot finds it by its name alone",
        ));
    }
    match signature.unsafety {
        Some(unsafety) => Err(Error::new(unsafety.span(), "a task cannot be `unsafe`")),
        None => Ok(()),
    }
}

/// What a task takes.
struct Parameters {
    takes_context: bool,
    values: Vec<(Ident, TokenStream)>,
    /// Those whose type is written `ObjectRef<..>`: the task begins when they are there.
    references: Vec<Ident>,
}

impl Parameters {
    fn read(function: &ItemFn) -> Result<Self> {
        let mut parameters = Parameters {
            takes_context: false,
            values: Vec::new(),
            references: Vec::new(),
        };
        for (position, argument) in function.sig.inputs.iter().enumerate() {
            let FnArg::Typed(argument) = argument else {
                continue;
            };
            if let Type::Reference(reference) = &*argument.ty
                && position == 0
                && reference.mutability.is_none()
                && names_type(&reference.elem, "TaskContext")
            {
                parameters.takes_context = true;
                continue;
            }
            let name = sent_argument(argument)?;
            if names_type(&argument.ty, "ObjectRef") {
                parameters.references.push(name.clone());
            }
            parameters
                .values
                .push((name, argument.ty.to_token_stream()));
        }
        Ok(parameters)
    }

    fn dependencies(&self) -> TokenStream {
        let references = &self.references;
        quote!(#(.after(&#references))*)
    }
}

fn write_execution(
    function: &ItemFn,
    inner: &Ident,
    name: &Ident,
    parameters: &Parameters,
    output: &Output,
) -> TokenStream {
    let text = name.to_string();
    let names: Vec<_> = parameters.values.iter().map(|(name, _)| name).collect();
    let types = parameters.values.iter().map(|(_, part)| part);
    let context = parameters.takes_context.then(|| quote!(&call.context,));
    let wait = function.sig.asyncness.map(|_| quote!(.await));
    let encode = match output {
        Output::Value(_) => quote!(task_value(&call.context, &returned)),
        Output::Fallible(..) => quote!(task_outcome(&call.context, &returned)),
        Output::Items(_) => quote!(task_items(&call.context, returned, call.items)),
    };
    quote! {
        fn execute(call: ::mobula::__private::TaskCall) -> ::mobula::__private::Executing {
            ::std::boxed::Box::pin(async move {
                let (#(#names,)*): (#(#types,)*) =
                    ::mobula::__private::task_arguments(#text, &call)?;
                let returned = #inner(#context #(#names),*) #wait;
                ::mobula::__private::#encode.await
            })
        }
    }
}

/// The attribute's arguments.
#[derive(Default)]
struct Options {
    name: Option<LitStr>,
    cpus: Option<f64>,
    gpus: Option<f64>,
    memory_bytes: Option<u64>,
    max_retries: Option<u32>,
    retry_errors: bool,
}

impl Options {
    fn read(arguments: TokenStream) -> Result<Self> {
        let mut options = Options::default();
        syn::meta::parser(|meta| options.read_one(&meta)).parse2(arguments)?;
        Ok(options)
    }

    fn read_one(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let is = |word: &str| meta.path.is_ident(word);
        if is("name") {
            let text: LitStr = meta.value()?.parse()?;
            if text.value().is_empty() || text.value().len() > 128 {
                return Err(Error::new(text.span(), "a task's name has 1 to 128 bytes"));
            }
            self.name = Some(text);
        } else if is("cpus") {
            self.cpus = Some(read_amount(&meta.value()?.parse()?)?);
        } else if is("gpus") {
            self.gpus = Some(read_amount(&meta.value()?.parse()?)?);
        } else if is("memory_bytes") {
            self.memory_bytes = Some(meta.value()?.parse::<LitInt>()?.base10_parse()?);
        } else if is("max_retries") {
            self.max_retries = Some(meta.value()?.parse::<LitInt>()?.base10_parse()?);
        } else if is("retry_errors") {
            self.retry_errors = meta.value()?.parse::<LitBool>()?.value;
        } else {
            return Err(meta.error(
                "unknown: use `name = \"..\"`, `cpus = 1`, `gpus = 0.5`, `memory_bytes = 1048576`, \
                 `max_retries = 3` or `retry_errors = true`",
            ));
        }
        Ok(())
    }

    fn write(&self, name: &Ident) -> TokenStream {
        let type_name = match &self.name {
            Some(name) => quote!(#name),
            None => quote!(::core::concat!(
                ::core::module_path!(),
                "::",
                ::core::stringify!(#name)
            )),
        };
        let option = |value: Option<TokenStream>| match value {
            Some(value) => quote!(::core::option::Option::Some(#value)),
            None => quote!(::core::option::Option::None),
        };
        let cpus = option(self.cpus.map(ToTokens::into_token_stream));
        let gpus = option(self.gpus.map(ToTokens::into_token_stream));
        let memory_bytes = option(self.memory_bytes.map(ToTokens::into_token_stream));
        let max_retries = option(self.max_retries.map(ToTokens::into_token_stream));
        let retry_errors = self.retry_errors;
        quote! {
            const DEFAULTS: ::mobula::__private::TaskDefaults = ::mobula::__private::TaskDefaults {
                name: #type_name,
                cpus: #cpus,
                gpus: #gpus,
                memory_bytes: #memory_bytes,
                max_retries: #max_retries,
                retry_errors: #retry_errors,
            };
        }
    }
}

/// An amount of cores or devices.
fn read_amount(literal: &Lit) -> Result<f64> {
    let amount = match literal {
        Lit::Int(number) => number.base10_parse::<f64>()?,
        Lit::Float(number) => number.base10_parse::<f64>()?,
        other => return Err(Error::new(other.span(), "a number, such as 1 or 0.5")),
    };
    Ok(amount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_a_task_is_refused_with_what_to_write() {
        let cases = [
            (
                quote!(
                    struct Square;
                ),
                "stands on a function of its own",
            ),
            (
                quote!(
                    async fn f(&self) {}
                ),
                "state belongs into an actor",
            ),
            (
                quote!(
                    async fn f<T>(x: T) {}
                ),
                "cannot be generic",
            ),
            (
                quote!(
                    async unsafe fn f() {}
                ),
                "cannot be `unsafe`",
            ),
            (
                quote!(
                    async fn f(x: &str) {}
                ),
                "`String` for `&str`",
            ),
            (
                quote!(
                    async fn f((a, b): (u8, u8)) {}
                ),
                "give this argument a name",
            ),
            (
                quote!(
                    async fn f(x: impl Fn()) {}
                ),
                "give its concrete type",
            ),
            (
                quote!(
                    async fn f() -> io::Result<u8> {}
                ),
                "write `Result<T, E>` with both types",
            ),
        ];
        for (item, expected) in cases {
            let text = item.to_string();
            let message = expand(TokenStream::new(), item)
                .expect_err("this must be refused")
                .to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn options_are_checked() {
        let function = quote!(
            async fn f() {}
        );
        for wrong in [
            quote!(name = ""),
            quote!(cpus = "1"),
            quote!(retries = 3),
            quote!(max_retries = -1),
        ] {
            let text = wrong.to_string();
            assert!(expand(wrong, function.clone()).is_err(), "{text}");
        }
        let all = quote!(
            name = "a.f",
            cpus = 1,
            gpus = 0.5,
            memory_bytes = 1_000,
            max_retries = 0,
            retry_errors = true
        );
        assert!(expand(all, function).is_ok());
    }

    #[test]
    fn a_stream_is_several_values() {
        let item = quote!(
            fn count(to: u64) -> impl Stream<Item = u64> {}
        );
        let text = expand(TokenStream::new(), item).unwrap().to_string();
        for expected in [
            "-> :: mobula :: Task < :: mobula :: __private :: Items < u64 > >",
            ":: task_items (& call . context , returned , call . items) . await",
        ] {
            assert!(text.contains(expected), "no {expected} in {text}");
        }
    }

    #[test]
    fn references_are_waited_for_and_the_context_is_not_an_argument() {
        let item = quote!(
            /// Adds.
            pub async fn add(ctx: &TaskContext, a: ObjectRef<u64>, b: u64) -> Result<u64, E> {}
        );
        let text = expand(TokenStream::new(), item).unwrap().to_string();
        for expected in [
            "pub fn add (a : ObjectRef < u64 > , b : u64) -> :: mobula :: Task < u64 >",
            ". after (& a)",
            "run_add (& call . context , a , b) . await",
            ":: task_outcome (",
            "\" Adds.\"",
        ] {
            assert!(text.contains(expected), "no {expected} in {text}");
        }
        assert!(!text.contains(". after (& b)"), "{text}");
    }
}
