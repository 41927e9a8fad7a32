//! `#[mobula::actor]`: from an `impl` block to an actor, its constructor and its calls.

mod calls;
mod dispatch;

use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};
use syn::spanned::Spanned;
use syn::{Error, ImplItem, ImplItemFn, ItemImpl, PathArguments, Result, Type, parse2};

use self::calls::write_calls;
use self::dispatch::write_dispatch;
use crate::method::{Method, Output, Purpose};
use crate::options::Options;

/// Reads the attribute and its block, and writes everything that makes an actor.
pub(crate) fn expand(arguments: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let options = Options::read(arguments)?;
    let mut block: ItemImpl = parse2(item)
        .map_err(|error| Error::new(error.span(), "#[mobula::actor] stands on an `impl` block"))?;
    let type_ident = check_block(&block)?;
    let actor = (*block.self_ty).clone();

    let mut methods = Vec::new();
    let mut descriptor = None;
    for item in &mut block.items {
        let ImplItem::Fn(function) = item else {
            continue;
        };
        let method = Method::read(function, &actor)?;
        if method.purpose == Purpose::Constructor {
            descriptor = Some((write_descriptor(function, &method), method));
            function.sig.ident = format_ident!("construct", span = function.sig.ident.span());
        } else {
            methods.push(method);
        }
    }
    let Some((descriptor, constructor)) = descriptor else {
        return Err(Error::new(
            block.self_ty.span(),
            "an actor needs a constructor: `fn new(..) -> Self` in this block",
        ));
    };
    block.items.push(ImplItem::Verbatim(descriptor));

    let calls: Vec<&Method> = methods
        .iter()
        .filter(|m| m.purpose == Purpose::Call)
        .collect();
    let type_name = match &options.name {
        Some(name) => quote!(#name),
        None => quote!(::core::concat!(
            ::core::module_path!(),
            "::",
            ::core::stringify!(#type_ident)
        )),
    };
    let dispatch = write_dispatch(&actor, &methods, &options)?;
    let registration = write_registration(&actor, &constructor, &options, &methods)?;
    let trait_and_impl = write_calls(&type_ident, &actor, &calls);
    Ok(quote! {
        #block

        impl ::mobula::Actor for #actor {
            const TYPE_NAME: &'static str = #type_name;
        }

        #dispatch
        #registration
        #trait_and_impl
    })
}

fn check_block(block: &ItemImpl) -> Result<Ident> {
    if let Some((_, path, _)) = &block.trait_ {
        return Err(Error::new(
            path.span(),
            "#[mobula::actor] stands on the type's own `impl` block, not on that of a trait",
        ));
    }
    if !block.generics.params.is_empty() || block.generics.where_clause.is_some() {
        return Err(Error::new(
            block.generics.span(),
            "an actor's type cannot be generic: a host finds it by its name alone",
        ));
    }
    if let Type::Path(path) = &*block.self_ty
        && path.qself.is_none()
        && let Some(last) = path.path.segments.last()
        && matches!(last.arguments, PathArguments::None)
    {
        return Ok(last.ident.clone());
    }
    Err(Error::new(
        block.self_ty.span(),
        "an actor is a plain named type without type arguments",
    ))
}

fn write_descriptor(function: &ImplItemFn, constructor: &Method) -> TokenStream {
    let visibility = &function.vis;
    let docs = &constructor.docs;
    let names = constructor.arguments.iter().map(|(name, _)| name);
    let values = constructor.arguments.iter().map(|(name, _)| name);
    let types = constructor.arguments.iter().map(|(_, argument)| argument);
    let fallback = docs
        .is_empty()
        .then(|| quote!(#[doc = "Describes a new actor of this type."]));
    quote! {
        #(#docs)*
        #fallback
        #[doc = ""]
        #[doc = "This only describes the actor, for `cluster.actor(..)`; the constructor itself is `construct`."]
        #[allow(dead_code, clippy::new_ret_no_self, clippy::too_many_arguments)]
        #visibility fn new(#(#names: #types),*) -> ::mobula::Init<Self> {
            ::mobula::__private::init(&(#(#values,)*))
        }
    }
}

fn write_registration(
    actor: &Type,
    constructor: &Method,
    options: &Options,
    methods: &[Method],
) -> Result<TokenStream> {
    let body = write_body(options, methods)?;
    let durable = options.durable;
    let names: Vec<_> = constructor.arguments.iter().map(|(name, _)| name).collect();
    let types = constructor.arguments.iter().map(|(_, argument)| argument);
    let context = constructor.takes_context.then(|| quote!(&context,));
    let wait = constructor.is_async.then(|| quote!(.await));
    let call = quote!(<#actor>::construct(#context #(#names),*) #wait);
    let constructed = match constructor.output {
        Output::Fallible(..) => quote!(::mobula::__private::constructed(#call)?),
        _ => call,
    };
    Ok(quote! {
        const _: () = {
            #[allow(unused_variables, clippy::let_unit_value)]
            fn construct(
                init: ::std::vec::Vec<u8>,
                context: ::mobula::ActorContext,
            ) -> ::mobula::__private::Constructing {
                ::std::boxed::Box::pin(async move {
                    let (#(#names,)*): (#(#types,)*) =
                        ::mobula::__private::constructor_arguments(&init)?;
                    let actor: #actor = #constructed;
                    ::core::result::Result::Ok(#body)
                })
            }
            ::mobula::__private::inventory::submit! {
                ::mobula::__private::ActorType {
                    name: <#actor as ::mobula::Actor>::TYPE_NAME,
                    constructor: construct,
                    durable: #durable,
                }
            }
        };
    })
}

/// The actor as its host takes it: one method at a time, or several.
fn write_body(options: &Options, methods: &[Method]) -> Result<TokenStream> {
    let calls = methods.iter().filter(|m| m.purpose == Purpose::Call);
    if !options.is_concurrent() {
        if let Some(method) = calls.clone().find(|method| method.group.is_some()) {
            options.group_of(method)?;
        }
        return Ok(quote!(::mobula::__private::ActorBody::serial(actor)));
    }
    let limits = options.limits();
    let heeds_notices = methods
        .iter()
        .any(|method| method.purpose == Purpose::Notice);
    let arms = calls
        .map(|method| {
            let text = method.name.to_string();
            let group = options.group_of(method)?;
            Ok(match method.is_exclusive {
                true => quote!(#text => ::mobula::__private::Access::Exclusive,),
                false => quote!(#text => ::mobula::__private::Access::Shared { group: #group },),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(quote! {
        ::mobula::__private::ActorBody::concurrent(
            actor,
            ::mobula::__private::Concurrency {
                limits: &[#(#limits),*],
                access: |method| match method {
                    #(#arms)*
                    _ => ::mobula::__private::Access::Shared { group: 0 },
                },
                heeds_notices: #heeds_notices,
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(block: TokenStream) -> String {
        expand(TokenStream::new(), block)
            .expect_err("this must be refused")
            .to_string()
    }

    #[test]
    fn what_cannot_be_an_actor_is_refused_with_what_to_write() {
        let cases = [
            (
                quote!(
                    struct Counter;
                ),
                "stands on an `impl` block",
            ),
            (quote!(impl Clone for Counter {}), "not on that of a trait"),
            (
                quote!(
                    impl<T> Counter<T> {}
                ),
                "cannot be generic",
            ),
            (quote!(impl Counter<u8> {}), "without type arguments"),
            (quote!(impl Counter {}), "needs a constructor"),
            (
                quote!(impl Counter { fn new() -> Self {} fn add<T>(&self, by: T) {} }),
                "cannot be generic: give its types",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} fn add(&self, name: &str) {} }),
                "`String` for `&str`",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} fn add(&self, name: Option<&str>) {} }),
                "cannot be borrowed",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} fn add(&self, f: impl Fn()) {} }),
                "give its concrete type",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} fn add(&self, (a, b): (u8, u8)) {} }),
                "give this argument a name",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} fn end(self) {} }),
                "lives on between calls",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} fn clone(&self) {} }),
                "an ActorRef has a `clone` of its own",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} fn add(&self) -> io::Result<u8> {} }),
                "write `Result<T, E>` with both types",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} #[mobula(notice)] async fn n(&mut self) {} }),
                "deadline_ms: u64",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} #[mobula(private)] fn n(&mut self) {} }),
                "`private` is unknown: use local, started, notice, stop, blocking or",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} #[mobula(group = "io")] fn n(&mut self) {} }),
                "one with `&mut self` runs alone",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} #[mobula(group = "io")] fn n(&self) {} }),
                "declare this group: #[mobula::actor(groups(io = 4))]",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} #[mobula(blocking)] async fn n(&self) {} }),
                "mobula::run_blocking",
            ),
            (
                quote!(impl Counter { fn new() -> Self {} #[mobula(stop)] fn n() {} }),
                "a hook needs `&self` or `&mut self`",
            ),
        ];
        for (block, expected) in cases {
            let text = block.to_string();
            let message = refusal(block);
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn wrong_options_are_refused() {
        let block = quote!(impl Counter { fn new() -> Self {} });
        for arguments in [
            quote!(title = "x"),
            quote!(name = ""),
            quote!(max_concurrency = 0),
            quote!(groups(io)),
            quote!(groups(io = 1, io = 2)),
            quote!(durable, max_concurrency = 2),
        ] {
            assert!(expand(arguments, block.clone()).is_err());
        }
        assert!(expand(quote!(name = "shop.counter"), block).is_ok());
    }

    #[test]
    fn calls_keep_names_documentation_and_types() {
        let block = quote!(
            impl Counter {
                fn new() -> Self {}
                /// Adds.
                async fn add(&mut self, ctx: &ActorContext, by: u64) -> Result<Self, E> {}
                #[mobula(local)]
                fn hidden(&self, borrowed: &str) {}
                fn helper(borrowed: &str) {}
            }
        );
        let text = expand(TokenStream::new(), block).unwrap().to_string();
        let call = "fn add (& self , by : u64) -> :: mobula :: FallibleCall < Counter , E >";
        assert!(text.contains(call), "{text}");
        assert!(text.contains("pub trait CounterCalls"), "{text}");
        assert!(!text.contains("\"hidden\""), "{text}");
        assert!(!text.contains("mobula (local)"), "{text}");
    }

    #[test]
    fn streams_are_told_from_values() {
        let block = quote!(
            impl Counter {
                fn new() -> Self {}
                fn count(&self) -> impl futures::Stream<Item = Option<u64>> + use<'_> {}
                async fn boxed(&mut self) -> StreamOf<Result<u64, E>> {}
            }
        );
        let text = expand(TokenStream::new(), block).unwrap().to_string();
        for expected in [
            "fn count (& self ,) -> :: mobula :: StreamCall < Option < u64 > >",
            "fn boxed (& self ,) -> :: mobula :: StreamCall < Result < u64 , E > >",
            "send_items (\"count\" , returned , items)",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn groups_reach_the_host() {
        let block = quote!(
            impl Shop {
                fn new() -> Self {}
                fn buy(&mut self) {}
                fn look(&self) {}
                #[mobula(group = "io", blocking)]
                fn read(&self) {}
            }
        );
        let options = quote!(max_concurrency = 8, groups(cpu = 1, io = 2));
        let text = expand(options, block).unwrap().to_string();
        for expected in [
            "limits : & [8u32 , 1u32 , 2u32]",
            "\"buy\" => :: mobula :: __private :: Access :: Exclusive",
            "\"look\" => :: mobula :: __private :: Access :: Shared { group : 0usize }",
            "\"read\" => :: mobula :: __private :: Access :: Shared { group : 2usize }",
            "run_blocking (|| self . read",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }
}
